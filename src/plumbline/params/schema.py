"""The schema of an experiment: every field's type, range, default and meaning."""

from __future__ import annotations

from functools import reduce
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

StepName = Literal[
    "prepare_data",
    "base_model",
    "sft",
    "reward_model",
    "judge",
    "rl",
    "dpo",
    "evaluate",
    "register",
]
STEP_NAMES: tuple[StepName, ...] = get_args(StepName)


def acts_with(**conditions: object) -> dict[str, Any]:
    """Marks a field that acts only where other fields of its section have one of these values."""
    allowed = {
        key.replace("__", "."): list(values) if isinstance(values, tuple) else [values]
        for key, values in conditions.items()
    }
    return {"acts_with": allowed}


class Params(BaseModel):
    """A frozen section of the params that refuses unknown keys and silent conversions.

    A field that the other fields make idle must be left alone: a value that nobody reads would
    mislead. A file or an override may not even name it (`plumbline.params.loader`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def idle(self) -> dict[str, str]:
        """The fields that have no effect here, each with the reason."""
        reasons = {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            conditions = extra.get("acts_with", {}) if isinstance(extra, dict) else {}
            for key, allowed in cast(dict[str, list[Any]], conditions).items():
                value = reduce(getattr, key.split("."), self)
                if value not in allowed:
                    wanted = " or ".join(_yaml(option) for option in allowed)
                    reasons[name] = f"acts only with {key}={wanted}, and {key} is {_yaml(value)}"
                    break
        return reasons

    def functions(self) -> dict[str, str]:
        """The Python functions that the params name, each with the field that names it."""
        return {}

    @model_validator(mode="after")
    def _idle_fields_are_left_alone(self) -> Self:
        # Not model_fields_set: a dumped experiment says every field, and must validate again.
        for name, reason in self.idle().items():
            if getattr(self, name) != type(self).model_fields[name].get_default(
                call_default_factory=True
            ):
                raise ValueError(f"{name} {reason}; remove {name}")
        return self


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*[:.][A-Za-z_]\w*$")]
"""module:function, or the same with a dot."""


class DataParams(Params):
    """Which data set is used, how it is split, and what happens to rows that break a rule."""

    path: str = Field(
        "data/sample", description="Folder of the data set, inside the DVC-tracked data/."
    )
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Share of the prompts held out, chosen by a hash of the prompt."
    )
    on_invalid: Literal["fail", "quarantine"] = Field(
        "fail",
        description="fail: any bad row stops the run. quarantine: bad rows are set aside.",
    )
    max_prompt_tokens: Count = Field(
        64, description="Longest prompt, chat template included; longer rows are invalid. Tokens."
    )
    max_response_tokens: Count = Field(
        64, description="Longest response in the data, end token included. Tokens."
    )
    long_prompts: Literal["refuse", "drop_turns"] = Field(
        "refuse",
        description="refuse: a prompt over the limit is an invalid row. drop_turns: its oldest "
        "turns are left out until it fits; the system prompt stays.",
    )


class ScratchModel(Params):
    """A language model with random weights and a tokenizer trained on the demonstrations."""

    source: Literal["scratch"] = Field("scratch", description="Random weights.")
    vocab_size: Annotated[int, Field(ge=300)] = Field(
        1024, description="Entries of the byte-level BPE tokenizer, special tokens included."
    )
    context_tokens: Count = Field(128, description="Longest sequence of the model. Tokens.")
    hidden_size: Count = Field(128, description="Width of the residual stream.")
    layers: Count = Field(4, description="Number of transformer blocks.")
    heads: Count = Field(4, description="Attention heads a block.")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size must be a multiple of heads: expected {self.hidden_size} % "
                f"{self.heads} == 0, got {self.hidden_size % self.heads}"
            )
        return self


class HubModel(Params):
    """A pretrained model of the Hugging Face hub at a pinned revision."""

    source: Literal["hub"] = Field(description="A model of the Hugging Face hub.")
    name: Annotated[str, Field(min_length=1)] = Field(
        description="Repository, for example HuggingFaceTB/SmolLM2-135M."
    )
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] = Field(
        description="Commit of the repository, 40 hex digits: a branch would move."
    )
    chat_template: str | None = Field(
        None, description="Jinja chat template; none takes the tokenizer's own, or a plain one."
    )


class LocalModel(Params):
    """A pretrained model in a local folder, as save_pretrained writes it."""

    source: Literal["local"] = Field(description="A folder on this machine.")
    path: Annotated[str, Field(min_length=1)] = Field(
        description="The folder; relative paths start at the project's root."
    )
    chat_template: str | None = Field(
        None, description="Jinja chat template; none takes the tokenizer's own, or a plain one."
    )


class GGUFModel(Params):
    """A pretrained model in a GGUF file, in a folder or inside an installed Python package."""

    source: Literal["gguf"] = Field(description="A GGUF file, read into ordinary weights.")
    file: Annotated[str, Field(pattern=r"^[^/\\]+\.gguf$")] = Field(
        description="Name of the file, for example SmolLM2-135M-Instruct.Q4_1.gguf."
    )
    path: str | None = Field(
        None, description="Its folder; relative paths start at the project's root."
    )
    package: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*$")] | None = Field(
        None, description="The installed package that holds it, by its import name."
    )
    chat_template: str | None = Field(
        None, description="Jinja chat template; none takes the tokenizer's own, or a plain one."
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.package is None):
            given = "neither" if self.path is None else "both"
            raise ValueError(f"expected one of path and package, which hold the file; got {given}")
        return self


PretrainedModel = HubModel | LocalModel | GGUFModel
ModelParams = Annotated[
    ScratchModel | HubModel | LocalModel | GGUFModel, Field(discriminator="source")
]


class SamplingParams(Params):
    """How responses are drawn, in training and evaluation alike."""

    response_tokens: Count = Field(
        48, description="Longest sampled response, end token included. Tokens."
    )
    temperature: Positive = Field(
        1.0, description="Divides the logits of policy, reference and update alike."
    )


class LoraParams(Params):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) in place of training all weights."""

    enabled: bool = Field(False, description="Train adapters on all linear layers of the blocks.")
    rank: Count = Field(
        16, description="Rank of the update.", json_schema_extra=acts_with(enabled=True)
    )
    alpha: Positive = Field(
        32.0,
        description="The update is scaled by alpha / rank.",
        json_schema_extra=acts_with(enabled=True),
    )


class OptimizerParams(Params):
    """AdamW with a warm-up and a decay, shared by all trainings."""

    learning_rate: LearningRate = Field(1e-3, description="Peak learning rate of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="Decay of the learning rate after the warm-up."
    )
    warmup_fraction: Fraction = Field(
        0.05, description="Share of the optimizer steps in which the learning rate rises."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="AdamW's decoupled weight decay."
    )
    max_grad_norm: Positive = Field(1.0, description="Gradients are scaled down to this L2 norm.")
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: less memory, a third slower.",
    )
    lora: LoraParams = Field(default_factory=lambda: LoraParams(), description="LoRA.")


_MICRO_BATCH_TOKENS = (
    "Tokens a forward pass, at most: memory and speed depend on it, results do not. Rows are never "
    "split; a longer one is passed alone."
)


class SupervisedParams(OptimizerParams):
    """Batches and epochs of a training over a fixed data set."""

    epochs: Count = Field(3, description="Passes over the training rows.")
    batch_size: Count = Field(32, description="Rows an optimizer step.")
    micro_batch_tokens: Count = Field(4096, description=_MICRO_BATCH_TOKENS)


class SFTParams(SupervisedParams):
    """Supervised fine-tuning on the demonstrations."""

    train_on_prompt: bool = Field(
        False, description="Let prompt tokens count in the loss, too, not only the response's."
    )


class RewardModelParams(SupervisedParams):
    """A scalar head on the SFT model, trained on people's judgements."""

    objective: Literal["pairwise", "pointwise"] = Field(
        "pairwise",
        description="pairwise: Bradley-Terry on preferences, with their margins where the data has "
        "them. pointwise: binary classification of the ratings.",
    )
    centering: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Weight of (r_chosen + r_rejected)^2, which pulls the scores to 0.",
        json_schema_extra=acts_with(objective="pairwise"),
    )
    normalize: Literal["mean", "mean_std"] = Field(
        "mean",
        description="Make the mean score of the demonstrations 0, or also their std 1.",
    )


class AlignmentParams(Params):
    """What follows the reward model."""

    method: Literal["rl", "dpo"] = Field(
        "rl",
        description="rl: reinforcement learning against the reward model. dpo: direct preference "
        "optimisation on the same pairs; the reward model then only judges.",
    )


class RLParams(OptimizerParams):
    """Reinforcement learning of the policy against the reward model."""

    algorithm: Literal["ppo", "reinforce", "rloo", "grpo"] = Field(
        "ppo",
        description="How advantages are made. ppo: GAE with a critic. reinforce: discounted return "
        "less a baseline. rloo: return less that of the other responses to the prompt. grpo: "
        "return standardised over the responses to the prompt.",
    )
    episodes: Count = Field(
        4096, description="Responses sampled in all; a multiple of rollout_batch_size."
    )
    rollout_batch_size: Count = Field(128, description="Responses sampled between two updates.")
    mini_batch_size: Count = Field(
        64, description="Responses an optimizer step; must divide rollout_batch_size."
    )
    micro_batch_tokens: Count = Field(4096, description=_MICRO_BATCH_TOKENS)
    epochs: Count = Field(4, description="Passes over each rollout.")
    responses_per_prompt: Annotated[int, Field(ge=2)] = Field(
        4,
        description="Responses to each prompt of a rollout; must divide rollout_batch_size.",
        json_schema_extra=acts_with(algorithm=("rloo", "grpo")),
    )
    baseline: Literal["none", "mean", "moving_average"] = Field(
        "mean",
        description="What is taken from the return: nothing, the rollout's mean return, or the "
        "moving average of these means.",
        json_schema_extra=acts_with(algorithm="reinforce"),
    )
    baseline_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9,
        description="Share of the old average that a rollout leaves.",
        json_schema_extra=acts_with(algorithm="reinforce", baseline="moving_average"),
    )
    critic: Literal["reward_model", "shared"] = Field(
        "reward_model",
        description="reward_model: a network of its own that starts from the reward model. shared: "
        "a head on the policy's trunk.",
        json_schema_extra=acts_with(algorithm="ppo"),
    )
    kl_coef: Annotated[float, Field(ge=0)] = Field(
        0.05, description="Weight of the KL penalty a token (beta), or its first value."
    )
    kl_in: Literal["reward", "loss"] = Field(
        "reward",
        description="Take the KL penalty from the rewards, or add it to the loss as GRPO does.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k1", description="Schulman's estimator of the KL penalty; in the loss k2 or k3."
    )
    kl_controller: Literal["fixed", "adaptive"] = Field(
        "fixed", description="adaptive: kl_coef follows kl_target (Ziegler et al. 2019, eq. 4)."
    )
    kl_target: Positive = Field(
        6.0,
        description="KL that the adaptive controller steers to. Nats a response.",
        json_schema_extra=acts_with(kl_controller="adaptive"),
    )
    kl_horizon: Count = Field(
        10_000,
        description="Episodes over which the adaptive controller acts.",
        json_schema_extra=acts_with(kl_controller="adaptive"),
    )
    gamma: Fraction = Field(
        1.0,
        description="Discount a token.",
        json_schema_extra=acts_with(algorithm=("ppo", "reinforce")),
    )
    gae_lambda: Fraction = Field(
        0.95,
        description="Decay of GAE's sum of TD errors.",
        json_schema_extra=acts_with(algorithm="ppo"),
    )
    cliprange: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="Clip range of the probability ratio."
    )
    cliprange_high: Positive | None = Field(
        None, description="Upper clip range, where it differs (clip-higher of DAPO)."
    )
    cliprange_value: Positive = Field(
        0.2,
        description="Clip range of the value around its old prediction.",
        json_schema_extra=acts_with(algorithm="ppo"),
    )
    value_coef: Annotated[float, Field(ge=0)] = Field(
        0.1,
        description="Weight of the value loss beside the policy loss.",
        json_schema_extra=acts_with(algorithm="ppo"),
    )
    entropy_coef: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of the entropy bonus a token."
    )
    target_kl: Positive | None = Field(
        None,
        description="End the epochs on a rollout once a mini-batch's approximate KL(old || new) "
        "passes this. Nats a token.",
    )
    whiten_advantages: bool = Field(
        True,
        description="Mean 0 and std 1 over the real tokens.",
        json_schema_extra=acts_with(algorithm=("ppo", "reinforce", "rloo")),
    )
    whiten_rewards: bool = Field(
        False,
        description="Std 1 over the real tokens, the mean left in place.",
        json_schema_extra=acts_with(algorithm=("ppo", "reinforce")),
    )
    reward_model_weight: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Weight of the reward model's score."
    )
    score_clip: Positive | None = Field(
        None, description="The reward model's score is cut to [-score_clip, score_clip]."
    )
    rewards: dict[FunctionName, float] = Field(
        default_factory=dict,
        description="Python functions (prompt, response) -> number to their weights, added to the "
        "score; weight 0 only draws the curve.",
    )
    missing_eos: Literal["replace", "subtract"] = Field(
        "replace",
        description="What a response without an end token scores: missing_eos_score itself, "
        "or its score less missing_eos_score.",
    )
    missing_eos_score: float = Field(
        -1.0, description="The constant of missing_eos: a score, or a penalty to subtract."
    )

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        _must_divide("rollout_batch_size", self.rollout_batch_size, "episodes", self.episodes)
        _must_divide(
            "mini_batch_size", self.mini_batch_size, "rollout_batch_size", self.rollout_batch_size
        )
        if self.algorithm in ("rloo", "grpo"):
            _must_divide(
                "responses_per_prompt", self.responses_per_prompt,
                "rollout_batch_size", self.rollout_batch_size,
            )  # fmt: skip
        return self

    @model_validator(mode="after")
    def _missing_eos_is_a_loss(self) -> Self:
        if self.missing_eos == "subtract" and self.missing_eos_score < 0:
            raise ValueError(
                "missing_eos_score is the penalty that missing_eos=subtract takes away: "
                f"expected a number >= 0, got {self.missing_eos_score}"
            )
        return self

    @model_validator(mode="after")
    def _kl_in_the_loss_has_a_gradient(self) -> Self:
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator: expected k2 or k3 with kl_in=loss, got k1, whose gradient is 0 on "
                "average, so that it would not hold the policy back"
            )
        return self

    def functions(self) -> dict[str, str]:
        """The reward functions."""
        return dict.fromkeys(self.rewards, "rl.rewards")

    @model_validator(mode="after")
    def _names_of_rewards_differ(self) -> Self:
        names = [reward_name(function) for function in self.rewards]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"rewards: expected functions of different names, each draws a curve; got "
                f"{', '.join(sorted(repeated))} more than once"
            )
        if "model" in names:
            raise ValueError(
                "rewards: expected a function of another name than model, whose curve "
                "objective/reward_model is the reward model's"
            )
        return self


def reward_name(function: str) -> str:
    """The name of a reward function's curve: the function without its module."""
    return function.replace(":", ".").rpartition(".")[2]


class DPOParams(SupervisedParams):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    beta: Positive = Field(0.1, description="Strength of the pull to the reference.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="Assumed share of wrong labels (conservative DPO)."
    )


class EvaluateParams(Params):
    """Comparison of the policy with the SFT model on held-out prompts."""

    max_prompts: Count = Field(512, description="Held-out prompts compared, at most.")
    batch_size: Count = Field(128, description="Responses sampled or scored at a time.")
    bootstrap_samples: Annotated[int, Field(ge=100)] = Field(
        2000, description="Resamplings behind each 95% interval."
    )
    table_rows: Annotated[int, Field(ge=1, le=500)] = Field(
        40, description="Rows of the table of samples."
    )
    gold: FunctionName | None = Field(
        None,
        description="Gold scorer that training never sees, as module:function; none for real data.",
    )
    judge: bool = Field(
        False,
        description="Split the training pairs into halves: one trains the reward model, the other "
        "an independent judge with another seed, which no training follows.",
    )
    best_of_n: Annotated[int, Field(ge=1, le=256)] = Field(
        8,
        description="Answers of the SFT model to each prompt, of which the reward model picks the "
        "best: the baseline of the reward-KL figure. 1 leaves it out.",
    )

    def functions(self) -> dict[str, str]:
        """The gold scorer."""
        return {self.gold: "evaluate.gold"} if self.gold else {}


class RegistryParams(Params):
    """Where the finished policy goes in the MLflow model registry."""

    name: Annotated[str, Field(pattern=r"^[\w .-]+$")] = Field(
        "plumbline-policy", description="Registered model that receives the new version."
    )
    alias: Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")] = Field(
        "challenger", description="Alias that points to the new version."
    )
    merge_lora: bool = Field(
        True, description="Register a policy trained with LoRA as one model, not as an adapter."
    )


class CheckpointParams(Params):
    """How often a training step saves its state; nothing of it changes a result."""

    every_minutes: Annotated[float, Field(gt=0)] = Field(
        10.0, description="Save when so many minutes have passed since the last checkpoint."
    )
    every_steps: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Save after so many optimizer steps, too; in rl sampling a rollout and closing "
        "it count as one each. null: by time alone.",
    )
    keep: Annotated[int, Field(ge=1)] = Field(
        2, description="Checkpoints of a step that are kept, the newest ones."
    )


class Experiment(Params):
    """Everything an alignment run is made of."""

    description: str = Field("", description="One line on what the experiment shows.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="Seed of weights, shuffles and sampling."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Of the matrix products in training and sampling; weights stay in fp32. auto: "
        "bf16 where the hardware is fast at it.",
    )
    data: DataParams = Field(default_factory=lambda: DataParams(), description="The data.")
    model: ModelParams = Field(
        default_factory=lambda: ScratchModel(), description="The base model."
    )
    sampling: SamplingParams = Field(
        default_factory=lambda: SamplingParams(), description="Drawing responses."
    )
    sft: SFTParams = Field(default_factory=lambda: SFTParams(), description="Step sft.")
    reward_model: RewardModelParams = Field(
        default_factory=lambda: RewardModelParams(), description="Steps reward_model and judge."
    )
    alignment: AlignmentParams = Field(
        default_factory=lambda: AlignmentParams(), description="Choice of step rl or dpo."
    )
    rl: RLParams = Field(
        default_factory=lambda: RLParams(),
        description="Step rl.",
        json_schema_extra=acts_with(alignment__method="rl"),
    )
    dpo: DPOParams = Field(
        default_factory=lambda: DPOParams(),
        description="Step dpo.",
        json_schema_extra=acts_with(alignment__method="dpo"),
    )
    evaluate: EvaluateParams = Field(
        default_factory=lambda: EvaluateParams(), description="Step evaluate."
    )
    registry: RegistryParams = Field(
        default_factory=lambda: RegistryParams(), description="Step register."
    )
    checkpoints: CheckpointParams = Field(
        default_factory=lambda: CheckpointParams(), description="Checkpoints of every training."
    )

    def functions(self) -> dict[str, str]:
        """Those of all sections."""
        return self.rl.functions() | self.evaluate.functions()

    @field_validator("precision", mode="before")
    @classmethod
    def _no_fp16(cls, value: object) -> object:
        if value in ("fp16", "float16", "half"):
            raise ValueError(
                f"expected auto, fp32 or bf16, got {value}: fp16 has no room for the range of "
                "log-probabilities and gradients here without loss scaling; bf16 costs the same"
            )
        return value

    @model_validator(mode="after")
    def _merging_needs_an_adapter(self) -> Self:
        aligned = self.rl if self.alignment.method == "rl" else self.dpo
        if not self.registry.merge_lora and not aligned.lora.enabled:
            raise ValueError(
                f"registry.merge_lora acts only with {self.alignment.method}.lora.enabled=true, "
                "and that is false; remove registry.merge_lora"
            )
        return self

    @model_validator(mode="after")
    def _sequences_fit_the_context(self) -> Self:
        if isinstance(self.model, ScratchModel):
            check_context(self, self.model.context_tokens)
        return self


def steps_of(experiment: Experiment) -> tuple[StepName, ...]:
    """The steps that a run of the experiment has, in order."""
    left_out = {"dpo" if experiment.alignment.method == "rl" else "rl"}
    if not experiment.evaluate.judge:
        left_out.add("judge")
    return tuple(step for step in STEP_NAMES if step not in left_out)


def check_context(experiment: Experiment, context_tokens: int) -> None:
    """Raise ValueError where a prompt and its response could outgrow the model's context."""
    response = max(experiment.data.max_response_tokens, experiment.sampling.response_tokens)
    needed = experiment.data.max_prompt_tokens + response
    if needed > context_tokens:
        raise ValueError(
            "prompt and response must fit the model's context: expected data.max_prompt_tokens + "
            "max(data.max_response_tokens, sampling.response_tokens) <= "
            f"{context_tokens}, got {experiment.data.max_prompt_tokens} + {response} = {needed}"
        )


def _must_divide(part: str, part_value: int, whole: str, whole_value: int) -> None:
    if whole_value % part_value:
        raise ValueError(
            f"{part} must divide {whole}: expected {whole_value} % {part_value} == 0, "
            f"got {whole_value % part_value}"
        )
