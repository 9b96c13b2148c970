"""The schema of an experiment: every field's type, range, default and meaning."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

StepName = Literal[
    "prepare_data", "base_model", "sft", "reward_model", "rl", "evaluate", "register"
]
STEP_NAMES: tuple[StepName, ...] = (
    "prepare_data",
    "base_model",
    "sft",
    "reward_model",
    "rl",
    "evaluate",
    "register",
)


class Params(BaseModel):
    """A frozen section of the params that refuses unknown keys and silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
LearningRate = Annotated[float, Field(gt=0, le=1)]


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


ModelParams = Annotated[ScratchModel | HubModel | LocalModel, Field(discriminator="source")]


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
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Gradients are scaled down to this L2 norm."
    )


class SupervisedParams(OptimizerParams):
    """Batches and epochs of a training over a fixed data set."""

    epochs: Count = Field(3, description="Passes over the training rows.")
    batch_size: Count = Field(32, description="Rows an optimizer step.")
    micro_batch_size: Count = Field(
        32, description="Rows a forward pass; must divide batch_size (gradient accumulation)."
    )

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> Self:
        _must_divide("micro_batch_size", self.micro_batch_size, "batch_size", self.batch_size)
        return self


class SFTParams(SupervisedParams):
    """Supervised fine-tuning on the demonstrations."""

    train_on_prompt: bool = Field(
        False, description="Let prompt tokens count in the loss, too, not only the response's."
    )


class RewardModelParams(SupervisedParams):
    """A scalar head on the SFT model, trained on pairs of responses."""

    objective: Literal["pairwise"] = Field(
        "pairwise", description="pairwise: Bradley-Terry on chosen against rejected."
    )
    centering: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of (r_chosen + r_rejected)^2, which pulls the scores to 0."
    )
    normalize: Literal["mean", "mean_std"] = Field(
        "mean",
        description="Make the mean score of the demonstrations 0, or also their std 1.",
    )


class RLParams(OptimizerParams):
    """Reinforcement learning of the policy against the reward model."""

    algorithm: Literal["ppo"] = Field("ppo", description="ppo: GAE with a separate critic.")
    episodes: Count = Field(
        4096, description="Responses sampled in all; a multiple of rollout_batch_size."
    )
    rollout_batch_size: Count = Field(128, description="Responses sampled between two updates.")
    mini_batch_size: Count = Field(
        64, description="Responses an optimizer step; must divide rollout_batch_size."
    )
    micro_batch_size: Count = Field(
        64, description="Responses a forward pass; must divide mini_batch_size."
    )
    epochs: Count = Field(4, description="Passes over each rollout.")
    response_tokens: Count = Field(
        48, description="Longest sampled response, end token included. Tokens."
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Divides the logits of policy, reference and update alike."
    )
    kl_coef: Annotated[float, Field(ge=0)] = Field(
        0.05, description="Weight of the KL penalty a token (beta), or its first value."
    )
    kl_controller: Literal["fixed", "adaptive"] = Field(
        "fixed", description="adaptive: kl_coef follows kl_target (Ziegler et al. 2019, eq. 4)."
    )
    kl_target: Annotated[float, Field(gt=0)] = Field(
        6.0, description="KL that the adaptive controller steers to. Nats a response."
    )
    kl_horizon: Count = Field(
        10_000, description="Episodes over which the adaptive controller acts."
    )
    gamma: Fraction = Field(1.0, description="Discount a token.")
    gae_lambda: Fraction = Field(0.95, description="Decay of GAE's sum of TD errors.")
    cliprange: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="PPO's clip range of the probability ratio."
    )
    cliprange_value: Annotated[float, Field(gt=0)] = Field(
        0.2, description="Clip range of the value around its old prediction."
    )
    value_coef: Annotated[float, Field(ge=0)] = Field(
        0.1, description="Weight of the value loss beside the policy loss."
    )
    whiten_advantages: bool = Field(True, description="Mean 0 and std 1 over the real tokens.")
    whiten_rewards: bool = Field(
        False, description="Std 1 over the real tokens, the mean left in place."
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
        _must_divide(
            "micro_batch_size", self.micro_batch_size, "mini_batch_size", self.mini_batch_size
        )
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
    def _unused_controller_fields(self) -> Self:
        # Not model_fields_set: a dumped experiment says every field, and must validate again.
        fields = type(self).model_fields
        unused = [
            name
            for name in ("kl_target", "kl_horizon")
            if getattr(self, name) != fields[name].default
        ]
        if self.kl_controller == "fixed" and unused:
            raise ValueError(
                f"{', '.join(unused)} acts only with kl_controller=adaptive, "
                "and kl_controller is fixed"
            )
        return self


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
    gold: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")] | None = Field(
        None,
        description="Gold scorer that training never sees, as module:function; none for real data.",
    )


class RegistryParams(Params):
    """Where the finished policy goes in the MLflow model registry."""

    name: Annotated[str, Field(pattern=r"^[\w .-]+$")] = Field(
        "plumbline-policy", description="Registered model that receives the new version."
    )
    alias: Annotated[str, Field(pattern=r"^[A-Za-z][\w-]*$")] = Field(
        "challenger", description="Alias that points to the new version."
    )


class Experiment(Params):
    """Everything an alignment run is made of."""

    description: str = Field("", description="One line on what the experiment shows.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="Seed of weights, shuffles and sampling."
    )
    data: DataParams = Field(default_factory=lambda: DataParams(), description="The data.")
    model: ModelParams = Field(
        default_factory=lambda: ScratchModel(), description="The base model."
    )
    sft: SFTParams = Field(default_factory=lambda: SFTParams(), description="Step sft.")
    reward_model: RewardModelParams = Field(
        default_factory=lambda: RewardModelParams(), description="Step reward_model."
    )
    rl: RLParams = Field(default_factory=lambda: RLParams(), description="Step rl.")
    evaluate: EvaluateParams = Field(
        default_factory=lambda: EvaluateParams(), description="Step evaluate."
    )
    registry: RegistryParams = Field(
        default_factory=lambda: RegistryParams(), description="Step register."
    )

    @model_validator(mode="after")
    def _sequences_fit_the_context(self) -> Self:
        if isinstance(self.model, ScratchModel):
            check_context(self, self.model.context_tokens)
        return self


def check_context(experiment: Experiment, context_tokens: int) -> None:
    """Raise ValueError where a prompt and its response could outgrow the model's context."""
    response = max(experiment.data.max_response_tokens, experiment.rl.response_tokens)
    needed = experiment.data.max_prompt_tokens + response
    if needed > context_tokens:
        raise ValueError(
            "prompt and response must fit the model's context: expected data.max_prompt_tokens + "
            "max(data.max_response_tokens, rl.response_tokens) <= "
            f"{context_tokens}, got {experiment.data.max_prompt_tokens} + {response} = {needed}"
        )


def _must_divide(part: str, part_value: int, whole: str, whole_value: int) -> None:
    if whole_value % part_value:
        raise ValueError(
            f"{part} must divide {whole}: expected {whole_value} % {part_value} == 0, "
            f"got {whole_value % part_value}"
        )
