"""The complete recipe, with the checks that span several sections."""

from typing import Any

from pydantic import model_validator

from pipeline.config.corpus import CorpusConfig, EvalConfig
from pipeline.config.dump import DumpConfig
from pipeline.config.engines import ENGINES
from pipeline.config.placement import PlacementConfig
from pipeline.config.section import Section
from pipeline.config.student import StudentConfig
from pipeline.config.teacher import TeacherConfig
from pipeline.config.text.generate import GenerateConfig
from pipeline.config.text.rounds import RoundsConfig
from pipeline.config.train import TrainConfig


class Recipe(Section):
    """A complete recipe: all sections of both stages."""

    corpus: CorpusConfig
    teacher: TeacherConfig
    dump: DumpConfig
    placement: PlacementConfig = PlacementConfig()
    student: StudentConfig | None = None
    train: TrainConfig = TrainConfig()
    eval: EvalConfig | None = None
    generate: GenerateConfig | None = None
    rounds: RoundsConfig | None = None

    @model_validator(mode="after")
    def _engine_gives_what_is_asked(self) -> "Recipe":
        if self.teacher.engine in ENGINES:  # a plug-in file is read when it is used
            check_engine_gives(self)
        return self

    @model_validator(mode="after")
    def _evaluations_have_text(self) -> "Recipe":
        if self.train.eval_every and self.eval is None and self.train.validation is None:
            raise ValueError(
                f"train.eval_every is {self.train.eval_every}, but there is no eval section to take text from: add one "
                "(eval: {source: ...}), or set train.eval_every=0"
            )
        return self

    @model_validator(mode="after")
    def _validation_is_another_text(self) -> "Recipe":
        validation = self.train.validation
        for name, reported in corpora_of(self).items() if self.eval is not None and validation is not None else ():
            assert validation is not None
            same = all(getattr(validation, key) == getattr(reported, key) for key in ("source", "split", "field"))
            last = validation.skip + min(validation.limit or self.train.eval_documents, self.train.eval_documents)
            last_reported = float("inf") if reported.limit is None else reported.skip + reported.limit
            if same and max(validation.skip, reported.skip) < min(last, last_reported):
                raise ValueError(
                    f"train.validation reads documents of {validation.source} that `bld eval` reports as {name}: what "
                    "chooses a checkpoint cannot judge it. Give another text, or other documents with skip and limit"
                )
        return self

    @model_validator(mode="after")
    def _objectives_on_tokens_have_one_teacher(self) -> "Recipe":
        objectives = self.train.objectives
        names = (*(("alm",) if objectives.alm else ()), *objectives.on_tokens)
        mixed = [] if self.student is None else [r for r in self.student.dumps_by_corpus.values() if len(r) > 1]
        if names and mixed:
            paths, name = ", ".join(ref.path for ref in mixed[0]), names[0]
            raise ValueError(
                f"train.objectives.{name} ({getattr(objectives, name):g}) matches one teacher's own tokens, which a "
                f"mix of student.dumps ({paths}) does not have; set {name} to 0, or name one dump of each corpus"
            )
        return self

    def with_values(self, **sections: Any) -> "Recipe":
        """Return a copy with whole sections replaced."""
        return self.model_copy(update=sections)


def check_engine_gives(recipe: Recipe) -> None:
    """Raise ValueError if the recipe asks its engine for what it cannot do."""
    teacher, spec = recipe.teacher, recipe.teacher.engine_spec
    if spec.needs_address and recipe.placement.base_url is None:
        raise ValueError(
            f"teacher.engine: {teacher.engine} needs placement.base_url, e.g. "
            "placement.base_url=http://127.0.0.1:8000/v1"
        )
    if recipe.dump.covering.beam_width and not spec.branches:
        does = "computes no branches" if spec.whole_softmax else "lists tokens of the canonical rows only"
        raise ValueError(f"teacher.engine: {teacher.engine} {does}; use dump.covering.beam_width=0")
    if recipe.dump.tokens is not None and not spec.whole_softmax:
        raise ValueError(
            f"teacher.engine: {teacher.engine} lists the most probable tokens only, which need not include the end "
            "token; dump.tokens needs an engine that sees the whole softmax (vllm, transformers)"
        )
    if teacher.quantization is not None and not spec.quantizes:
        raise ValueError(
            f"teacher.quantization ({teacher.quantization}) is not supported by {teacher.engine}; leave it out"
        )


def student_config(recipe: Recipe) -> StudentConfig:
    """Return the recipe's student section. Raises ValueError if there is none."""
    if recipe.student is None:
        raise ValueError("the recipe has no student section; add one (student: {model: ..., path: ...}) to train")
    return recipe.student


def generate_config(recipe: Recipe) -> GenerateConfig:
    """Return the recipe's generate section. Raises ValueError if there is none."""
    if recipe.generate is None:
        raise ValueError(
            "the recipe has no generate section; add one (generate: {path: ..., prompts: {source: ...}}) to write text"
        )
    return recipe.generate


def corpora_of(recipe: Recipe) -> dict[str, CorpusConfig]:
    """Return the recipe's held-out corpora by name. Raises ValueError if it has none."""
    if recipe.eval is None:
        raise ValueError("the recipe has no eval section: add one (eval: {source: ...}) or give --corpus SOURCE")
    out_of_domain = recipe.eval.out_of_domain
    other = {} if out_of_domain is None else {"out_of_domain": out_of_domain}
    return {"held_out": recipe.eval.corpus} | recipe.eval.corpora | other
