"""The schema of a run: every dial, its default and its rules; imports no torch, so that mistakes answer at once.

A file a group of conf/, but for transfer, whose schema is transfer/config.py and whose rules with other groups are
transfer_rules.py; run.py is the whole, rules.py what the rules share. Nothing here is made or run.
Rules inside one group live in that class's `__post_init__`, rules across groups in `RunConfig.__post_init__`. A
message says what was given, what is allowed and which key to change. rlhf/compose.py and rlhf/plugins make the
choices known to Hydra.
"""

from rlhf.config.alarms import AlarmsConfig
from rlhf.config.checkpoint import CheckpointConfig
from rlhf.config.cut import Cut
from rlhf.config.logger import (
    ConsoleLoggerConfig,
    JsonlLoggerConfig,
    LoggerConfig,
    MlflowLoggerConfig,
    TensorboardLoggerConfig,
    TrackioLoggerConfig,
    WandbLoggerConfig,
    WandbMode,
)
from rlhf.config.model import (
    Device,
    GivenModelConfig,
    HfModelConfig,
    LoraConfig,
    ModelConfig,
    Precision,
    TinyModelConfig,
)
from rlhf.config.optim import AdamWConfig, OptimConfig, Schedule
from rlhf.config.reward import (
    FunctionRewardConfig,
    GivenRewardConfig,
    HttpRewardConfig,
    JudgeRewardConfig,
    MathRewardConfig,
    ModelRewardConfig,
    RewardConfig,
    RewardPart,
    SumRewardConfig,
    VerifierRewardConfig,
)
from rlhf.config.rollout import HfRolloutConfig, Logprobs, RolloutConfig, VllmRolloutConfig
from rlhf.config.run import (
    EvaluateConfig,
    EvaluationConfig,
    Mode,
    Objective,
    ProfileConfig,
    RunConfig,
    SftConfig,
    all_logprobs,
    needs_logprobs,
)
from rlhf.config.task import (
    AgentTaskConfig,
    ArithmeticTaskConfig,
    EnvironmentConfig,
    EnvironmentTaskConfig,
    FileTaskConfig,
    GivenTaskConfig,
    GuessTaskConfig,
    HfTaskConfig,
    JsonlTaskConfig,
    ReasoningGymTaskConfig,
    ReverseTaskConfig,
    SequenceTaskConfig,
    SortTaskConfig,
    TaskConfig,
)
from rlhf.config.transfer_rules import check_transfer

__all__ = [
    "AdamWConfig",
    "AgentTaskConfig",
    "AlarmsConfig",
    "ArithmeticTaskConfig",
    "CheckpointConfig",
    "ConsoleLoggerConfig",
    "Cut",
    "Device",
    "EnvironmentConfig",
    "EnvironmentTaskConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "FileTaskConfig",
    "FunctionRewardConfig",
    "GivenModelConfig",
    "GivenRewardConfig",
    "GivenTaskConfig",
    "GuessTaskConfig",
    "HfModelConfig",
    "HfRolloutConfig",
    "HfTaskConfig",
    "HttpRewardConfig",
    "JsonlLoggerConfig",
    "JsonlTaskConfig",
    "JudgeRewardConfig",
    "LoggerConfig",
    "Logprobs",
    "LoraConfig",
    "MathRewardConfig",
    "MlflowLoggerConfig",
    "Mode",
    "ModelConfig",
    "ModelRewardConfig",
    "Objective",
    "OptimConfig",
    "Precision",
    "ProfileConfig",
    "ReasoningGymTaskConfig",
    "ReverseTaskConfig",
    "RewardConfig",
    "RewardPart",
    "RolloutConfig",
    "RunConfig",
    "Schedule",
    "SequenceTaskConfig",
    "SftConfig",
    "SortTaskConfig",
    "SumRewardConfig",
    "TaskConfig",
    "TensorboardLoggerConfig",
    "TinyModelConfig",
    "TrackioLoggerConfig",
    "VerifierRewardConfig",
    "VllmRolloutConfig",
    "WandbLoggerConfig",
    "WandbMode",
    "all_logprobs",
    "check_transfer",
    "needs_logprobs",
]
