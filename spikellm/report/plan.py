"""A plan on the console, before the run and beside what the run has taken."""

from spikellm.store.record import PlannedStage, PlanRecord, Results

UNITS = ((3600, "h"), (60, "min"), (1, "s"))


def plan_table(plan: PlanRecord) -> str:
    """What a run would take, stage by stage."""
    gpu = plan.device_free_gib is not None
    where = "one decoder layer in memory at a time" if plan.offload else "the model in memory"
    lines = [
        f"plan: weights of {plan.weights_gib:.2f} GiB, {where}; a run that finds nothing in the store",
        f"  {'stage':<12}{'time':>10}{'read':>12}{'written':>12}{'memory':>12}" + (f"{'GPU':>12}" if gpu else ""),
    ]
    for name, stage in plan.stages.items():
        sizes = [stage.reads_gib, stage.writes_gib, stage.memory_gib, *([stage.device_gib or 0] if gpu else [])]
        lines.append(f"  {name:<12}{duration(stage.seconds):>10}" + "".join(f"{f'{size:.2f} GiB':>12}" for size in sizes))
    memory = f"{_most(plan):.2f} GiB of {plan.memory_free_gib:.1f} free"
    if gpu and plan.device_free_gib is not None:
        device = max(stage.device_gib or 0 for stage in plan.stages.values())
        memory += f", on the GPU {device:.2f} GiB of {plan.device_free_gib:.1f} free"
    lines += [
        f"  in all {duration(plan.seconds)}   memory {memory}   disk {plan.disk_gib:.1f} GiB of {plan.disk_free_gib:.1f} free",
        f"  this machine: {plan.products_gflops:.0f} GFLOP/s in float32 products, {plan.copying_gib_per_s:.1f} GiB/s in memory, "
        f"{plan.reading_gib_per_s:.2f} GiB/s from disk, {plan.threads} CPU threads",
    ]
    return "\n".join(lines)


def planned_and_measured(results: Results) -> list[str]:
    """A line for each stage that was planned and computed; nothing where nothing was planned."""
    if results.plan is None:
        return []
    lines = ["  planned, measured"]
    for name, stage in results.plan.stages.items():
        took = results.stages.get(name)
        if took is None or took.cached:
            continue
        line = f"    {name:<12}{duration(stage.seconds):>10}{duration(took.seconds):>10}"
        for title, wanted, found in _memories(stage, took.memory_gib, took.device_gib):
            line += f"   {title}{wanted:>7.2f}{found:>7.2f} GiB"
        lines.append(line)
    return lines if len(lines) > 1 else []


def _memories(stage: PlannedStage, memory: float | None, device: float | None) -> list[tuple[str, float, float]]:
    known = [("memory", stage.memory_gib, memory), ("GPU", stage.device_gib, device)]
    return [(title, wanted, found) for title, wanted, found in known if wanted is not None and found is not None]


def _most(plan: PlanRecord) -> float:
    return max((stage.memory_gib for stage in plan.stages.values()), default=0.0)


def duration(seconds: float) -> str:
    """A time in the unit that a person would take."""
    size, unit = next((each for each in UNITS if seconds >= 2 * each[0]), UNITS[-1])
    return f"{seconds / size:.3g} {unit}" if seconds < 100 * size else f"{seconds / size:.0f} {unit}"
