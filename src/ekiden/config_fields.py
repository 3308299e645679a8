"""Every setting of a run, in one flat dataclass: the field is the flag is the YAML key.

Each field's docstring is its help text and says its unit. `config` builds the dataclass from presets, recipes and flags,
`config_checks` refuses values that no run could use, and `RESUME_FREE` names the fields that may change on resume.
"""

from __future__ import annotations

import ast
import functools
import inspect
import typing
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class TrainConfig:
    """The settings of one training run."""

    preset: str = "gpt2-10m"
    """Model preset that supplies the fields below it: a name from `ekiden train --list-presets`."""
    dataset_path: str = ""
    """Folder of token shards, as `ekiden preprocess` wrote it."""
    output_dir: str = ""
    """Run directory: config, history, checkpoints, best and final model. Run again with the same one to resume."""

    # The model
    model_type: Literal["gpt2", "gemma3"] = "gpt2"
    """Architecture family."""
    hidden_size: int = 256
    """Width of the residual stream, in units."""
    num_hidden_layers: int = 8
    """Decoder blocks."""
    num_attention_heads: int = 8
    """Query heads a block."""
    num_key_value_heads: int = 8
    """Key/value heads a block (Gemma 3; GPT-2 has as many as query heads)."""
    head_dim: int = 32
    """Units a head (Gemma 3; GPT-2's is hidden_size / num_attention_heads)."""
    intermediate_size: int = 1024
    """Width of the feed-forward layer, in units."""
    sliding_window: int = 512
    """Attention window of Gemma 3's local layers, in tokens."""
    rope_scaling_factor: float = 1.0
    """Linear position scaling of Gemma 3's global layers (8 for the 4B shape)."""
    max_length: int = 512
    """Tokens in one sample, and the context length the model is trained for."""
    document_mask: bool = False
    """Tokens attend to their own document only, where a sample holds parts of several; positions run on."""
    initialization: Literal["huggingface", "scaled", "unigram", "cooccurrence"] = "cooccurrence"
    """Weights at step 0: transformers' own; scaled so that every block starts quiet beside the residual stream; unigram:
    scaled, and it predicts how frequent each token is; or cooccurrence: that, and tokens that stand near one another in the
    text have neighbouring rows in the embedding."""
    local_heads: bool = True
    """Gemma 3 that begins with frequencies (unigram, cooccurrence): heads of the first block look one, two and three tokens back
    at step 0."""

    # The order of the data
    seed: int = 1337
    """Seed of the initial weights and of the order of the data."""
    temperature: float = 1.0
    """Mixture: a language with n tokens is drawn in proportion to n to this power (1: as they are, 0: equally)."""
    small_language_share: float = 0.15
    """Part of its share that every language gives to those with less than half of an equal one, which are raised to one
    level, an equal share at most, as long as their text is read 4 times at most; 0: none."""
    final_temperature: float = 1.0
    """The same for the last final_share of the run: below temperature, small languages are read more where it counts most."""
    final_share: float = 0.0
    """Share of the run, at its end, that final_temperature holds for; 0: none."""
    language_weights: dict[str, float] = field(default_factory=dict)
    """Explicit mixture instead of temperature, as name=share pairs: english=0.6,hindi=0.4. Others are left out."""
    final_language_weights: dict[str, float] = field(default_factory=dict)
    """Explicit mixture of the last final_share of the run instead of final_temperature, as name=share pairs: a language that
    is not named has no part in it."""
    max_epochs_per_language: float = 0.0
    """Cap on how often a language's text is repeated over the whole run, in epochs; 0 means no cap."""

    # The batch
    batch_size: int = 16
    """Samples in one microbatch on one device; auto (or 0): the most that fit, found by trying when the run begins, and
    again on another kind of machine; it needs global_batch_size."""
    gradient_accumulation_steps: int = 1
    """Microbatches a device adds up before one optimizer step, at the start of the run."""
    global_batch_size: int = 0
    """Samples of one optimizer step on all devices together, instead of batch_size x gradient_accumulation_steps x
    devices; as many microbatches as it takes are added up. 0: that product."""

    # The length of the run
    max_steps: int = 0
    """Optimizer steps of the whole run; 0: taken from epochs."""
    epochs: float = 1.0
    """Passes over all training tokens, where max_steps is 0."""
    max_time: str = ""
    """Stop and save before this much time has passed since the process began: 11h30m, 45m, 90s. Empty: no limit."""

    # The optimizer
    optimizer: Literal["adamw", "muon"] = "muon"
    """adamw for every parameter, or muon for the matrices of the blocks and AdamW for the rest."""
    learning_rate: float = 0.006
    """Peak learning rate of AdamW; with muon of vectors, and of the embedding times sqrt(256 / hidden_size)."""
    matrix_learning_rate: float = 0.02
    """Peak learning rate of muon's matrices, the same for every width."""
    muon_momentum: float = 0.95
    """Muon's decay of the momentum, from muon_momentum_steps on."""
    muon_first_momentum: float = 0.6
    """The same at step 0: at first the gradient's direction changes fast, and an old one is in the way."""
    muon_momentum_steps: int = 300
    """Steps in which the momentum, and the beta1 of the AdamW beside muon, rise on a line from the first to the last."""
    muon_even: bool = True
    """Every row (or column, where there are more) of a matrix moves as far as the others in a step of muon."""
    schedule: Literal["cosine", "wsd"] = "wsd"
    """Learning rate after the warm-up: cosine, or wsd: constant, then a line down over the last decay_ratio of the run."""
    decay_ratio: float = 0.6
    """Share of the run's steps in which wsd decays."""
    decay_from: str = ""
    """A run or checkpoint to go on from while the learning rate falls to its end: what closes a wsd run at any time."""
    decay_steps: int = 0
    """Steps of decay_from's decay, which then decide the length of the run; 0: a quarter of the steps done before."""
    min_learning_rate_ratio: float = 0.0
    """Learning rate at the last step, as a share of the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0; at most a tenth of the run is used, with muon a fiftieth."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; vectors (norms, biases) have none."""
    beta1: float = 0.8
    """AdamW's decay of the first moment; with muon from muon_momentum_steps on."""
    muon_first_beta1: float = 0.6
    """The same at step 0, with muon."""
    beta2: float = 0.98
    """AdamW's decay of the second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    optimizer_moments: Literal["fp32", "bf16", "fp16", "8bit"] = "fp32"
    """Numbers AdamW keeps its two moments in: 8, 4, 4 or 2 bytes a parameter; 8bit needs `pip install 'ekiden[bnb]'`."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0: never."""

    # The machine
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Matrix arithmetic: auto is bf16 from compute capability 8.0, fp16 with loss scaling below, fp32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the decoder: auto is on for CUDA (where a compiler is found) and off on a CPU."""
    num_threads: int = 0
    """CPU threads for arithmetic; 0: as many as the cores. Recorded, since sums differ with it in the last bit."""
    activation_checkpointing: bool = False
    """Keep only each block's input and compute the block again in the backward pass: a third more time, much less memory."""
    cpu_offload: bool = False
    """Keep AdamW's moments in the host's memory and update there: 8 bytes a parameter less on a GPU, slower steps."""
    loss_chunk_size: int = 1024
    """Token positions whose logits exist at one time while the loss is computed."""

    # Several devices
    devices: int = 1
    """Processes that train together on this machine, one a GPU (or a share of the CPU's cores); above 1, torchrun is
    started for them. Leave it at 1 under torchrun or accelerate launch."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: every device holds the whole model; fsdp: a part of it. auto: ddp where weights, gradients and moments fit."""
    elastic_exact: bool = False
    """Sum gradients along a fixed tree: 1, 2, 4 ... devices give the same bits (ddp; costs copies of the gradient)."""
    rank_timeout: str = "1m"
    """Time after which a device's process that gives no sign of life is taken for lost, and the others stop."""
    max_restarts: int = 0
    """Times that --devices starts all processes again after one of them has died, from the newest checkpoint."""

    # What happens when
    log_steps: int = 10
    """Steps between two records in history.jsonl."""
    eval_steps: int = 250
    """Steps between two evaluations of the test split; 0: only at the end."""
    eval_tokens: int = 20_000
    """Tokens of each language's test split evaluated in a run; 0: all of them."""
    sample_steps: int = 0
    """Steps between two sets of sample texts; 0: only at the end."""
    sample_prompts: list[str] = field(default_factory=list)
    """Openings of the sample texts; empty: the openings of each language's first test documents."""
    sample_tokens: int = 48
    """Length of a sample text, in tokens."""
    save_steps: int = 250
    """Steps between two checkpoints; 0: only when the run stops."""
    max_checkpoints: int = 4
    """Newest checkpoints kept (at least 2), beside the best model."""
    checkpoint_budget: str = ""
    """Bytes that all kept checkpoints may take together, as 8GB or 500MB. Empty: 90 % of the space that is free or
    theirs, and on Kaggle no more than its 20 GB of output allow."""
    background_save: bool = True
    """Write checkpoints beside training, from a copy of the state; off: training waits for the disk."""
    mirror: str = ""
    """Copy of the newest checkpoint elsewhere, uploaded beside training: hf://OWNER/REPO, s3://BUCKET/FOLDER, any
    fsspec URL or a folder. The same command on an empty machine goes on from it. Empty: none."""
    checkpoint_format: Literal["folder", "json"] = "folder"
    """json: best/ and final_model/ also as best_model.json and final_model.json (weights, step, config, tokenizer)."""
    resume_from: str = "auto"
    """auto: the newest verified checkpoint of output_dir, else a fresh start. Or a run, a checkpoint, a Hugging Face
    folder, a .pt or a .json: the whole state where it is Ekiden's, else its weights, and optimizer and step if they fit."""
    init_from: str = ""
    """Weights to begin a new run with, at step 0: a run, a checkpoint, a Hugging Face folder, a .pt or a .json of the
    same shape and tokenizer. Empty: random ones."""

    # Bad steps
    max_bad_steps: int = 3
    """Steps in a row with a non-finite loss or gradient that are skipped before the run rolls back to its last checkpoint."""
    max_rollbacks: int = 2
    """Roll-backs before the run stops as failed."""

    # What shows the run
    report: bool = True
    """Keep `RUN/report.html` up to date, and `RUN/loss.png` (needs `pip install 'ekiden[report]'`)."""
    use_wandb: bool = False
    """Send the history to Weights & Biases as well (needs `pip install 'ekiden[wandb]'`)."""
    trackers: list[str] = field(default_factory=list)
    """Programs the history is sent to as well: tensorboard (into `RUN/tensorboard`), trackio, wandb; several with commas.
    Each needs its extra: `pip install 'ekiden[tensorboard,trackio]'`."""
    wandb_project: str = "ekiden"
    """Project in Weights & Biases and trackio."""

    def samples_per_step(self, devices: int) -> int:
        """Return the global batch of a run that begins on so many devices, in samples."""
        return self.global_batch_size or self.batch_size * self.gradient_accumulation_steps * devices


RESUME_FREE = frozenset(
    "dataset_path output_dir max_steps epochs max_time device num_threads compile log_steps eval_steps eval_tokens "
    "sample_steps sample_prompts sample_tokens save_steps max_checkpoints checkpoint_budget background_save "
    "mirror checkpoint_format resume_from init_from max_bad_steps max_rollbacks report use_wandb trackers wandb_project "
    "batch_size gradient_accumulation_steps global_batch_size learning_rate min_learning_rate_ratio loss_chunk_size "
    "devices parallel elastic_exact rank_timeout max_restarts matrix_learning_rate schedule decay_ratio "
    "decay_from decay_steps activation_checkpointing cpu_offload".split()
)
"""May change on resume; the change is recorded in the history. `batch_size` and `gradient_accumulation_steps` may
only change together so that the global batch stays; `training.state` checks that. `dataset_path` may move, its
fingerprint may not change."""


@functools.cache
def field_help() -> dict[str, str]:
    """Return the docstring under each field of `TrainConfig`, by field name."""
    body = ast.parse(inspect.getsource(TrainConfig)).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for statement, following in zip(body.body, body.body[1:]):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            texts[statement.target.id] = " ".join(str(following.value.value).split())
    return texts


@functools.cache
def field_types() -> dict[str, Any]:
    """Return the resolved type of each field of `TrainConfig`."""
    return typing.get_type_hints(TrainConfig)
