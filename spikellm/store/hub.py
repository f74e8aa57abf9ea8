"""Whether a server answers, asked once and in seconds; a job without the hub uses what is cached and does not wait for it.

The hub's client retries for minutes where nobody answers: each file of a model, its tokenizer and every data set anew. A job that
needs the hub asks beforehand, and where there is no answer the client is told so until the job ends; what is not in its cache is then
an error at once.
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from spikellm.config.choices import DatasetSource, ModelSource
from spikellm.config.schema import Config

log = logging.getLogger(__name__)

PATIENCE_S = 3.0
SERVER_ERROR = 500  # statuses from here on, a gateway's 502 to 504 among them: the clients try again and again


def answers(url: str, patience_s: float = PATIENCE_S) -> bool:
    """Whether a server answers a request for `url`, be it by refusing it, within `patience_s` in all; through the environment's proxy.

    A thread of its own asks, for a name server or a server that sends a byte now and then keeps no time limit.
    """
    if any(os.environ.get(name) for name in ("ALL_PROXY", "all_proxy")):
        return True  # SOCKS, which the standard library does not speak: the client has to find out
    replies: SimpleQueue[bool] = SimpleQueue()
    threading.Thread(target=lambda: replies.put(_reply(url, patience_s)), daemon=True).start()
    try:
        return replies.get(timeout=patience_s)
    except Empty:
        return False


def _reply(url: str, timeout_s: float) -> bool:
    try:
        urlopen(Request(url, method="HEAD"), timeout=timeout_s).close()
    except HTTPError as error:
        return error.code < SERVER_ERROR
    except (OSError, HTTPException, ValueError):  # a certificate that is not trusted here: the clients ask again and again then, too
        return False
    return True


def needs_hub(config: Config) -> bool:
    """Whether a job reads anything that may have to come from the hub."""
    model, dataset = config.model, config.dataset
    remote = [model.source is ModelSource.hub and not Path(model.path).is_dir()]
    remote += [text.source is DatasetSource.hub for text in (dataset.calibration, dataset.evaluation, *dataset.extra.values())]
    return any(remote) or bool(dataset.zero_shot.tasks and dataset.zero_shot.path is None)


@contextmanager
def cache_if_silent(config: Config, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Within: where `config` needs the hub and it does not answer, its clients keep to their cache. Afterwards they are as before."""
    from huggingface_hub import constants

    if not needs_hub(config) or constants.HF_HUB_OFFLINE or answers(constants.ENDPOINT, patience_s):
        yield
        return
    log.warning("the hub does not answer: only its local cache is used")
    _tell_clients(offline=True)
    try:
        yield
    finally:
        _tell_clients(offline=False)


def _tell_clients(*, offline: bool) -> None:
    """The hub's client, which transformers asks, and `datasets`, which keeps a copy from when it was imported."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = offline
    datasets = sys.modules.get("datasets")
    if datasets is not None and "HF_DATASETS_OFFLINE" not in os.environ:
        datasets.config.HF_HUB_OFFLINE = offline
