"""Recipe sections: frozen models that refuse unknown keys.

`corpus`, `teacher` and `dump` decide the content of a dump (its identity); `placement` decides where and how fast it
runs, and may change between a run and its resume.

May import `pipeline.runtime` and `schemas`.
"""

from pipeline.config.corpus import CorpusConfig, EvalConfig
from pipeline.config.dump import CoveringConfig, DumpConfig, DumpPath
from pipeline.config.engines import EngineSpec
from pipeline.config.placement import PlacementConfig
from pipeline.config.recipe import Recipe, check_engine_gives, corpora_of, generate_config, student_config
from pipeline.config.section import Section
from pipeline.config.student import DumpRef, StudentConfig
from pipeline.config.tasks import TasksConfig, WatchedTasksConfig
from pipeline.config.teacher import TeacherConfig
from pipeline.config.text.generate import GenerateConfig, PromptsConfig
from pipeline.config.text.supervise import SuperviseConfig
from pipeline.config.train import MlflowConfig, SamplesConfig, TrainConfig, WandbConfig
from pipeline.config.training.deepspeed import DeepSpeedConfig
from pipeline.config.training.objectives import Objectives
from pipeline.config.transfer import TransferConfig

__all__ = [
    "CorpusConfig",
    "CoveringConfig",
    "DeepSpeedConfig",
    "DumpConfig",
    "DumpPath",
    "DumpRef",
    "EngineSpec",
    "EvalConfig",
    "GenerateConfig",
    "MlflowConfig",
    "Objectives",
    "PlacementConfig",
    "PromptsConfig",
    "Recipe",
    "SamplesConfig",
    "Section",
    "StudentConfig",
    "SuperviseConfig",
    "TasksConfig",
    "TeacherConfig",
    "TrainConfig",
    "TransferConfig",
    "WandbConfig",
    "WatchedTasksConfig",
    "check_engine_gives",
    "corpora_of",
    "generate_config",
    "student_config",
]
