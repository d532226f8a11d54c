"""`bld generate`: text by the teacher or the student, as a corpus."""

from pipeline.cli.engines import OnRay, RayAddress, Worker, engines_elsewhere, parse_worker
from pipeline.cli.options import DryRun, Metrics, Overrides, RecipeArgument, ask_for_metrics, load


def generate(
    recipe: RecipeArgument,
    override: Overrides = None,
    dry_run: DryRun = False,
    worker: Worker = None,
    ray: OnRay = False,
    address: RayAddress = None,
    metrics: Metrics = None,
) -> None:
    """Write text: the teacher or the student (generate.writer) continues prompts, as a corpus; or resume it.

    `bld teacher` dumps the corpus (corpus.source: its folder or address); what the model wrote is supervised, prompts
    are not. Without --worker, --ray or several tasks of SLURM, engines run on all GPUs of this machine
    (placement.engines); which engine writes a completion does not matter to it. Several processes started on one corpus
    share its shards. Exit codes: 0 done, 1 an error, which is named, 2 a wrong option, 130 or 143 stopped by SIGINT or
    SIGTERM; the same command resumes.
    """
    if dry_run:
        from stage1_teacher.generation.dry_run import print_plan

        print_plan(load(recipe, override), None if worker is None else parse_worker(worker), ray)
        return
    from pipeline.runtime.metrics import served
    from stage1_teacher.generation.run import run_generate

    ask_for_metrics(metrics)
    connect = engines_elsewhere(worker, ray, address)
    with served():
        run_generate(load(recipe, override), parse_worker(worker), connect)
