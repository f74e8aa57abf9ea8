"""The stage that lets the spiking model write.

generate    the spiking model, prompts      -> texts, seconds, spikes and synaptic operations a token, a raster of one layer
"""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from spikellm.config.boundary import read_file
from spikellm.config.checks import check
from spikellm.config.choices import Execution
from spikellm.evaluation.generation import Written, is_streamed, write
from spikellm.execution.memory import fitting_chunk
from spikellm.execution.stepped import stepped
from spikellm.model.load import model_config
from spikellm.model.pretrained import PreTrainedModel
from spikellm.run.converting import CHANGES, dependence, spiking
from spikellm.run.fitting import CALIBRATE, SEARCH, plain
from spikellm.run.stage import KeyedStage, Stage, StageOutcome
from spikellm.run.workspace import Workspace
from spikellm.spikes.accounts import spikes_record
from spikellm.spikes.raster import raster_rows
from spikellm.store.artifacts import read_json, write_json
from spikellm.store.provenance import Code
from spikellm.store.record import Findings, GenerateRecord, TextRecord

log = logging.getLogger(__name__)

GIVE = 'give a text, generate.prompt="The capital of France is", or a file, generate.prompts_file=FILE'


class Generate(KeyedStage):
    """Texts that the spiking model writes behind prompts."""

    name = "generate"
    needs: ClassVar[tuple[Stage, ...]] = (CALIBRATE, SEARCH, *CHANGES)
    code = Code(1, ("evaluation.networks", "evaluation.generation", "execution.stepped", "spikes.accounts", "spikes.raster"))

    def inputs(self, work: Workspace) -> dict[str, object]:
        """What the network is made of, how it runs, the prompts and the options."""
        options = {key: value for key, value in plain(work.config.generate).items() if key not in ("prompt", "prompts_file")}
        execution = {"execution": work.config.snn.execution.value}
        return self.depends(work) | execution | options | {"code": self.code.key(), "prompts": prompts(work)}

    def depends(self, work: Workspace) -> dict[str, object]:
        """What the network is made of."""
        return dependence(work) | {"search": SEARCH.key(work), "device": work.device}

    def network(self, work: Workspace) -> PreTrainedModel:
        """The spiking model."""
        return spiking(work)

    def prefix_tokens(self, work: Workspace) -> list[int]:
        """That stand before every sequence already."""
        return CALIBRATE.found(work).prefix_tokens

    def prepare(self, work: Workspace) -> None:
        """Refuse without a prompt or a tokenizer, and a layer that is not there."""
        options = work.config.generate
        found = prompts(work)
        check(work.tokenizer is not None, key_of(work), named(work), f"model={work.model.name} has no tokenizer; take a model that has one")
        if (layer := options.raster) is not None:
            layers = model_config(work.model).num_hidden_layers
            check(layer < layers, "generate.raster", layer, f"model={work.model.name} has layers 0 to {layers - 1}")
        log.debug("generate: %d prompts", len(found))

    def compute(self, work: Workspace, folder: Path) -> None:
        """Write, then count the spikes of what was written."""
        options, snn, model = work.config.generate, work.config.snn, self.network(work)
        asked, tokenizer = tokens(work, self.prefix_tokens(work)), work.tokenizer
        assert tokenizer is not None
        longest = max(map(len, asked)) + options.max_new_tokens
        context = getattr(model.config, "max_position_embeddings", longest)
        if longest > context:
            log.warning("generate.max_new_tokens=%d: %d tokens with the prompt, %s was trained on %d",
                        options.max_new_tokens, longest, work.model.name, context)  # fmt: skip
        is_stepped = snn.execution is Execution.stepped
        chunk = fitting_chunk(model, longest, chunk=snn.step_chunk, max_gib=snn.max_memory_gib) if is_stepped else None
        with stepped(model, chunk=chunk) if is_stepped else nullcontext():
            written = write(model, tokenizer, asked, options)
            write_json(folder / "generated.json", self._record(work, model, written).to_json())
            if options.raster is not None:
                prompt, new = written.texts[0]
                write_json(folder / "raster.json", raster_rows(model, prompt, new, layer=options.raster))

    def _record(self, work: Workspace, model: PreTrainedModel, written: Written) -> GenerateRecord:
        tokenizer, ledger = work.tokenizer, written.spikes(model)
        assert tokenizer is not None
        spikes = None if ledger is None else spikes_record(ledger)
        texts = [str(tokenizer.decode(new, skip_special_tokens=True)) for _, new in written.texts]
        return GenerateRecord(
            texts=[
                TextRecord(prompt=prompt, text=text, prompt_tokens=len(ids), tokens=len(new))
                for prompt, text, (ids, new) in zip(prompts(work), texts, written.texts, strict=True)
            ],
            seconds=written.seconds,
            seconds_prompt=written.seconds_prompt,
            seconds_per_token=written.seconds_per_token,
            firing_rate=None if spikes is None else spikes.firing_rate,
            spikes_per_token=None if spikes is None else spikes.spikes_per_token,
            sops_per_token=None if spikes is None else spikes.sops_per_token,
        )

    def run(self, work: Workspace) -> StageOutcome:
        """Texts and what they cost for results.json; on the console those that were not seen while they were written."""
        artefact = self.artefact(work)
        found = GenerateRecord.from_json(read_json(artefact.folder / "generated.json"))
        if artefact.cached or not is_streamed(found.texts, work.config.generate):
            for text in found.texts:
                log.info("generate: %s%s", text.prompt, text.text)
        raster = artefact.folder / "raster.json"
        rows = read_json(raster) if raster.is_file() else []
        return StageOutcome(artefacts=[artefact], findings=Findings(generate=found), tables={"raster.csv": rows} if rows else {})


GENERATE = Generate()


def key_of(work: Workspace) -> str:
    """The option that names the prompts."""
    return "generate.prompt" if work.config.generate.prompts_file is None else "generate.prompts_file"


def named(work: Workspace) -> str | None:
    """What stands there."""
    options = work.config.generate
    return options.prompt if options.prompts_file is None else options.prompts_file


def prompts(work: Workspace) -> list[str]:
    """The texts that are to be continued.

    Raises:
        InputError: there are none.
    """
    options = work.config.generate
    if (path := options.prompts_file) is None:
        check(bool(options.prompt), "generate.prompt", "null" if options.prompt is None else options.prompt, GIVE)
        return [str(options.prompt)]
    what, cure = f"generate.prompts_file={path}", "give a UTF-8 text file with a prompt a line"
    content = read_file(path, what, cure)
    try:
        found = [line for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        found = []
    check(bool(found), "generate.prompts_file", path, f"holds no line of UTF-8 text; {cure}")
    return found


def tokens(work: Workspace, prefix_tokens: list[int]) -> list[Int[Tensor, " _"]]:
    """The prompts in token ids; the tokenizer's BOS stands there only where it is not in the prefix already.

    Raises:
        InputError: one of them has no token.
    """
    tokenizer = work.tokenizer
    assert tokenizer is not None
    special = tokenizer.bos_token_id not in prefix_tokens
    found = [torch.tensor(tokenizer(prompt, add_special_tokens=special)["input_ids"], dtype=torch.long) for prompt in prompts(work)]
    for prompt, ids in zip(prompts(work), found, strict=True):
        check(len(ids) > 0, key_of(work), repr(prompt), "has no token for the model's tokenizer; give a longer text")
    return found
