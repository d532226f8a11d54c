"""The recipe: what a run does, as frozen models that refuse unknown keys.

What decides the content of a dump (its identity) lives in `corpus`, `teacher` and `dump`; where and how fast it runs
lives in `placement`, which may change between a run and its resume.

May import `pipeline.runtime` and `schemas`.
"""

from pipeline.config.corpus import CorpusConfig, EvalConfig
from pipeline.config.dump import CoveringConfig, DumpConfig, DumpPath
from pipeline.config.engines import EngineSpec
from pipeline.config.placement import PlacementConfig
from pipeline.config.recipe import Recipe, check_engine_gives, corpora_of, student_config
from pipeline.config.section import Section
from pipeline.config.student import DumpRef, StudentConfig
from pipeline.config.tasks import TasksConfig
from pipeline.config.teacher import TeacherConfig
from pipeline.config.train import DeepSpeedConfig, Objectives, TrainConfig, WandbConfig

__all__ = [
    "CorpusConfig",
    "CoveringConfig",
    "DeepSpeedConfig",
    "DumpConfig",
    "DumpPath",
    "DumpRef",
    "EngineSpec",
    "EvalConfig",
    "Objectives",
    "PlacementConfig",
    "Recipe",
    "Section",
    "StudentConfig",
    "TasksConfig",
    "TeacherConfig",
    "TrainConfig",
    "WandbConfig",
    "check_engine_gives",
    "corpora_of",
    "student_config",
]
