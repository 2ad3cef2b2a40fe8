"""The parts of this package, registered as everybody's are; their makers are named, and imported when first needed."""

from __future__ import annotations

from rlhf.config import (
    AdamWConfig,
    AgentTaskConfig,
    ArithmeticTaskConfig,
    ConsoleLoggerConfig,
    EnvironmentTaskConfig,
    FunctionRewardConfig,
    GivenRewardConfig,
    GivenTaskConfig,
    GuessTaskConfig,
    HfTaskConfig,
    HttpRewardConfig,
    JsonlLoggerConfig,
    JsonlTaskConfig,
    JudgeRewardConfig,
    MathRewardConfig,
    MlflowLoggerConfig,
    ModelRewardConfig,
    ReasoningGymTaskConfig,
    ReverseTaskConfig,
    SortTaskConfig,
    SumRewardConfig,
    TensorboardLoggerConfig,
    TrackioLoggerConfig,
    VerifierRewardConfig,
    WandbLoggerConfig,
)
from rlhf.plugins.part import COMPARES, CRITIC, SERVICE, TOKENS, Part
from rlhf.plugins.registry import register

TASKS, REWARDS, LOGGERS = "rlhf.tasks", "rlhf.rewards.make", "rlhf.monitor.loggers"
OBJECTIVE, ESTIMATES = "rlhf.learning.objective", "rlhf.learning.estimates"
GROUPS, SERVICES = frozenset({COMPARES}), frozenset({SERVICE})
PACKAGE = f"{LOGGERS}:check_package"
EVENTS = {"tensorboard/": "the same as TensorBoard's events"}
OF_WANDB = {"wandb/": "the same as Weights & Biases keeps it"}
OF_MLFLOW = {"mlflow.db": "the same for MLflow, where it has no other store"}

PARTS = (
    Part("task", "sort", SortTaskConfig, f"{TASKS}.procedural:sequence_task"),
    Part("task", "reverse", ReverseTaskConfig, f"{TASKS}.procedural:sequence_task"),
    Part("task", "arithmetic", ArithmeticTaskConfig, f"{TASKS}.procedural:arithmetic_task"),
    Part("task", "guess", GuessTaskConfig, f"{TASKS}.guess:guess_task"),
    Part("task", "jsonl", JsonlTaskConfig, f"{TASKS}.files:jsonl_task"),
    Part("task", "hf", HfTaskConfig, f"{TASKS}.files:hf_task"),
    Part("task", "given", GivenTaskConfig, f"{TASKS}.given:given_task"),
    Part("task", "environment", EnvironmentTaskConfig, f"{TASKS}.staged:environment_task"),
    Part("task", "agent", AgentTaskConfig, "rlhf.agents.task:agent_task"),
    Part("task", "reasoning_gym", ReasoningGymTaskConfig, f"{TASKS}.reasoning_gym:reasoning_gym_task"),
    Part("reward", "verifier", VerifierRewardConfig, f"{REWARDS}:verifier", f"{REWARDS}:check_verifier"),
    Part("reward", "math", MathRewardConfig, f"{REWARDS}:mathematics"),  # preflight/before_torch.py tries it
    Part("reward", "model", ModelRewardConfig, f"{REWARDS}:reward_model", f"{REWARDS}:check_model"),
    Part("reward", "function", FunctionRewardConfig, f"{REWARDS}:function", f"{REWARDS}:check_function"),
    Part("reward", "http", HttpRewardConfig, f"{REWARDS}:http"),  # preflight/before_torch.py looks for its server
    Part("reward", "judge", JudgeRewardConfig, f"{REWARDS}:judge"),  # nor for this one
    Part("reward", "given", GivenRewardConfig, f"{REWARDS}:given_functions"),  # which tries them
    Part("reward", "sum", SumRewardConfig),  # made of the others
    Part("loss", "clip", make=f"{OBJECTIVE}:clip"),  # PPO's clipped surrogate
    Part("loss", "gspo", make=f"{OBJECTIVE}:gspo"),  # the same with one ratio a row
    Part("loss", "cispo", make=f"{OBJECTIVE}:cispo"),  # the clipped ratio as a weight of -A log pi
    Part("loss", "sapo", make=f"{OBJECTIVE}:sapo"),  # the ratio through a sigmoid, a gate that closes softly
    Part("loss", "reinforce", make=f"{OBJECTIVE}:reinforce"),  # -A log pi
    Part("advantage", "group_norm", make=f"{ESTIMATES}:group_norm", traits=GROUPS),  # GRPO
    Part("advantage", "group_mean", make=f"{ESTIMATES}:group_mean", traits=GROUPS),  # Dr.GRPO
    Part("advantage", "leave_one_out", make=f"{ESTIMATES}:leave_one_out", traits=GROUPS),  # RLOO
    Part("advantage", "reinforce_pp", make=f"{ESTIMATES}:reinforce_pp", traits=frozenset({TOKENS})),  # REINFORCE++
    Part(  # the same with the group's mean as baseline
        "advantage", "reinforce_pp_baseline", make=f"{ESTIMATES}:reinforce_pp_baseline", traits=GROUPS | {TOKENS}
    ),
    Part("advantage", "gae", make=f"{ESTIMATES}:gae", traits=frozenset({TOKENS, CRITIC})),  # PPO
    Part("optimizer", "adamw", AdamWConfig, "rlhf.learning.optimizer:adamw"),
    Part("logger", "console", ConsoleLoggerConfig),  # the run's bars and table
    Part(
        "logger", "jsonl", JsonlLoggerConfig, f"{LOGGERS}:jsonl", writes={"metrics.jsonl": "every number of every step"}
    ),
    Part("logger", "tensorboard", TensorboardLoggerConfig, f"{LOGGERS}:tensorboard", writes=EVENTS),
    Part("logger", "wandb", WandbLoggerConfig, f"{LOGGERS}:WandbLogger", PACKAGE, SERVICES, writes=OF_WANDB),
    Part("logger", "mlflow", MlflowLoggerConfig, f"{LOGGERS}:MlflowLogger", PACKAGE, SERVICES, writes=OF_MLFLOW),
    Part("logger", "trackio", TrackioLoggerConfig, f"{LOGGERS}:TrackioLogger", PACKAGE, SERVICES),
)

for part in PARTS:
    register(part)
