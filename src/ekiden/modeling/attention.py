"""How the layers attend in training: a kernel that was tried on this device, and never a mask that is not needed.

transformers makes a dense T x T mask for local layers, and under `torch.compile` for all layers, which no flash kernel
takes; without a compiler it asks the device twice in every forward pass whether positions begin anew. Here

* full layers, and local ones of at most a window, are plainly causal, without a mask;
* on a CPU with AVX-512 a kernel of our own takes fp32 and the windows of local layers too (`kernels`);
* elsewhere longer local layers attend in chunks: the first window causally, then every chunk of queries to itself and the window
  before it, under one small mask that all chunks share. Exact, on any device; T x 1.5 window instead of T x T.
* with `document_mask` no token attends to another document.

`attention_choice` chooses the kernels and `prepare.prepare_model` installs them; `build.hidden_states` hands the masks of a
microbatch to the decoder. A call that does not come from there, as generation with its cache, is transformers' own.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ekiden.errors import UserError
from ekiden.modeling import kernels
from ekiden.modeling.device import in_fp32
from ekiden.modeling.half import autocast_dtype, flash_attention

NAME = "ekiden"
"""Of this attention among transformers' implementations."""
DOCUMENT_MASK = "document_mask"
"""In a model's config.json: true where its tokens saw their own document alone."""
Masks = dict[str, torch.Tensor | None]
"""Additive masks by place, or None for plainly causal: `full` [b or 1, 1, T, T]; of local layers longer than the window
w `first` [b, 1, w, w] and `rest` [b n or 1, 1, c, w + c] for n chunks of c queries."""


@dataclass(frozen=True)
class Kernel:
    """A way to compute scaled dot-product attention.

    Attributes:
        backend: PyTorch's implementation; None: Ekiden's own (`kernels`).
        grouped: it reads key/value heads that queries share; else they are copied.
    """

    backend: SDPBackend | None
    grouped: bool = True

    @property
    def name(self) -> str:
        """In a word or two, as the start of a run prints it."""
        if self.backend is None:
            return "own AVX-512"
        word = {SDPBackend.EFFICIENT_ATTENTION: "memory-efficient", SDPBackend.CUDNN_ATTENTION: "cudnn"}
        return word.get(self.backend, self.backend.name.split("_")[0].lower())


OWN = Kernel(None)
"""For fp32 on a CPU with AVX-512, without a mask; it also takes windows."""
MATH = Kernel(SDPBackend.MATH, grouped=False)
"""What the others are compared with, and the last resort: plain products and a softmax, T x T numbers a head."""


@dataclass(frozen=True)
class Attention:
    """How a model's layers attend.

    Attributes:
        causal: kernel without a mask. masked: kernel with one; None: no layer has any.
        window: tokens that local layers see, themselves included; None: there are none.
        boundary: (token id, whether it ends a document and not begins it) that parts documents; None: they see each other.
    """

    causal: Kernel
    masked: Kernel | None = None
    window: int | None = None
    boundary: tuple[int, bool] | None = None

    def describe(self) -> str:
        """Return the kernels' names, as `flash` or `flash, memory-efficient with a mask`."""
        if self.masked is None or self.masked.name == self.causal.name:
            return self.causal.name
        return f"{self.causal.name}, {self.masked.name} with a mask"

    @property
    def takes_windows(self) -> bool:
        """Whether local layers need no mask either, however long."""
        return self.causal.backend is None and self.boundary is None

    def masks(self, input_ids: torch.Tensor, dtype: torch.dtype) -> Masks:
        """Return the masks that windows of token ids [b, T] need, in the type of the queries."""
        length, device = input_ids.shape[1], input_ids.device
        long = self.window is not None and length > self.window
        found: Masks = {"full": None, "first": None, "rest": None}
        if self.takes_windows:
            return found
        documents = None if self.boundary is None else document_numbers(input_ids, *self.boundary)
        if documents is not None:
            positions = torch.arange(length, device=device)
            causal = positions[:, None] >= positions
            same = causal & (documents[:, :, None] == documents[:, None, :])
            found["full"] = additive_mask(same, dtype)
            if long:
                found["first"] = additive_mask(same[:, : self.window, : self.window], dtype)
        if long:
            assert self.window is not None
            found["rest"] = additive_mask(_rest(self.window, length, documents, device), dtype)
        return found


def chunk_of(window: int) -> int:
    """Return the queries of a chunk: half a window, so that it looks at 1.5 windows (a whole one: at 2)."""
    return window // 2 if window % 2 == 0 else window


def document_boundary(settings: Any) -> tuple[int, bool]:
    """Return the token id that parts documents in the shards, and whether it ends them: EOS, else BOS, which begins them.

    Raises:
        UserError: the tokenizer has neither.
    """
    if settings.eos_token_id is not None:
        return settings.eos_token_id, True
    if settings.bos_token_id is not None:
        return settings.bos_token_id, False
    raise UserError(
        "--document-mask needs a tokenizer with an EOS or a BOS piece, by which documents are told apart; leave it out"
    )


def document_numbers(input_ids: torch.Tensor, token: int, ends: bool) -> torch.Tensor:
    """Return the number of its document for every token [b, T], counted from the left edge of its window.

    Args:
        token: the id that ends (`ends`) or begins every document.
    """
    marks = (input_ids == token).long()
    return marks.cumsum(-1) - marks if ends else marks.cumsum(-1)


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 where `allowed` [b, q, k] and minus infinity elsewhere: [b, 1, q, k]."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, float("-inf")).unsqueeze(1)


def _rest(window: int, length: int, documents: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Return what the chunks after the first window may see: bool [1 or b n, c, w + c]."""
    chunk = chunk_of(window)
    query = torch.arange(chunk, device=device)[:, None]
    key = torch.arange(window + chunk, device=device)  # the first one stands a window before the first query
    allowed = ((key > query) & (key <= query + window)).unsqueeze(0)
    if documents is None:
        return allowed
    count = -(-(length - window) // chunk)
    # What fills up the last chunk is a document of its own: a row that sees nothing would be NaN.
    filled = pad(documents, (0, window + count * chunk - length), value=-1)
    queries = filled[:, window:].unflatten(1, (count, chunk)).flatten(0, 1)
    keys = filled.unfold(1, window + chunk, chunk).flatten(0, 1)
    return allowed & (queries[:, :, None] == keys[:, None, :])


def forward_arguments(model: nn.Module, input_ids: torch.Tensor) -> dict[str, Any]:
    """Return what `model`'s decoder is called with beside the token ids [b, T]; nothing where none is installed.

    The attention mask only keeps transformers from making one, and from looking for padding and restarted positions.
    """
    attention: Attention | None = getattr(model, "attention", None)
    if attention is None:
        return {}
    # Not another: a CPU's kernel reads a mask of another width as if it were its own.
    dtype = autocast_dtype(model.get_input_embeddings().weight)  # type: ignore[operator]
    masks = attention.masks(input_ids, dtype)
    if model.config.model_type == "gpt2":  # type: ignore[union-attr]
        return {"attention_mask": input_ids[:, None, None, :0], "ekiden_masks": masks}
    none = dict.fromkeys(("full_attention", "sliding_attention"))
    return {"attention_mask": none, "ekiden_masks": masks}


def _forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    ekiden_masks: Masks | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend in one layer, as transformers calls it: query [b, h, T, d], key and value [b, g, T, d] to [b, T, h, d]."""
    if ekiden_masks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    attention: Attention = module.attention
    window = attention.window
    if sliding_window is None or window is None or query.shape[2] <= window:
        return _attend(attention, query, key, value, ekiden_masks["full"], scaling).transpose(1, 2), None
    if attention.takes_windows:
        return own_attention(query, key, value, scaling, window).transpose(1, 2), None
    first = ekiden_masks["first"]
    rest = ekiden_masks["rest"]
    assert rest is not None
    return attend_in_chunks(attention, query, key, value, window, first, rest, scaling), None


def _attend(
    attention: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    """Return [b, h, q, d]: plainly causal where there is no mask."""
    kernel = attention.causal if mask is None else attention.masked
    assert kernel is not None
    return run_kernel(kernel, query, key, value, mask, scaling)


def run_kernel(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
) -> torch.Tensor:
    """Return what `kernel` makes of query [b, h, q, d] and key, value [b, g, k, d]; causal without a `mask`.

    Raises:
        RuntimeError: it does not take these shapes on this device.
    """
    if kernel.backend is None:
        if mask is not None:
            raise RuntimeError("the attention kernel takes no mask")
        return own_attention(query, key, value, scaling)
    groups = query.shape[1] // key.shape[1]
    # A CPU has flash, which it takes by itself; choosing it anew for every layer costs 10 microseconds each.
    here = query.device.type == "cpu" and kernel.backend is SDPBackend.FLASH_ATTENTION
    rounding = here and in_fp32(query.device, autocast_dtype(query))
    if groups > 1 and (rounding or not kernel.grouped):
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        groups = 1
    if rounding:
        query, key, value = taken_to_type(query, key, value)
        return flash_attention(query, key, value, mask, scaling)
    with nullcontext() if here else sdpa_kernel(kernel.backend):
        return scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
        )


def taken_to_type(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return query, key and value in the type that autocast takes them to, which it does not for operators of our own."""
    return [tensor.to(autocast_dtype(tensors[0])) for tensor in tensors]


def own_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None = None,
) -> torch.Tensor:
    """Return `kernels.attention`, under autocast as of PyTorch's."""
    query, key, value = taken_to_type(query, key, value)
    return kernels.attention(query, key, value, scaling, window)


def attend_in_chunks(
    attention: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    first: torch.Tensor | None,
    rest: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Return [b, T, h, d] of a local layer, T above the window: its first window, then chunk by chunk."""
    length, chunk = query.shape[2], chunk_of(window)
    head = [tensor[:, :, :window] for tensor in (query, key, value)]
    begun = _attend(attention, head[0], head[1], head[2], first, scaling).transpose(1, 2)
    count = -(-(length - window) // chunk)
    missing = window + count * chunk - length
    if missing:  # behind every real query, so that none sees it
        query, key, value = (pad(tensor, (0, 0, 0, missing)) for tensor in (query, key, value))

    def part(tensor: torch.Tensor, begin: int) -> torch.Tensor:
        """Return `count` chunks from `begin` on: [b, n, heads, c, d]."""
        return tensor[:, :, begin : begin + count * chunk].unflatten(2, (count, chunk)).transpose(1, 2)

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        """Return what every chunk looks at, itself last: [b n, heads, w + c, d]."""
        parts = [part(tensor, begin) for begin in range(0, window + chunk, chunk)]
        return torch.cat(parts, dim=3).flatten(0, 1)

    queries = part(query, window).flatten(0, 1)
    made = _attend(attention, queries, seen(key), seen(value), rest, scaling).transpose(1, 2)
    batch, heads, width = query.shape[0], query.shape[1], query.shape[3]
    made = made.reshape(batch, count * chunk, heads, width)
    return torch.cat([begun, made[:, : length - window]], dim=1)


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def install(model: PreTrainedModel, attention: Attention) -> None:
    """Let `model` attend in this way whenever `build.hidden_states` calls it."""
    model.config._attn_implementation = NAME
    for module in [model, *(m for m in model.modules() if type(m).__name__.endswith("Attention"))]:
        module.attention = attention  # type: ignore[assignment]


def attention_name(model: nn.Module) -> str:
    """Return what `model` attends with, in words; an environment's fact, since sums differ from kernel to kernel."""
    attention: Attention | None = getattr(model, "attention", None)
    return "transformers'" if attention is None else attention.describe()
