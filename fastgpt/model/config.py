"""The size and shape of a GPT-2, in Hugging Face's names."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from fastgpt.errors import UserError

# name -> n_layer, n_head, n_embd, n_positions. The first four are GPT-2's own (Radford et al. 2019, table 2).
PRESETS = {
    "gpt2": (12, 12, 768, 1024),
    "gpt2-medium": (24, 16, 1024, 1024),
    "gpt2-large": (36, 20, 1280, 1024),
    "gpt2-xl": (48, 25, 1600, 1024),
    "nano": (6, 6, 384, 256),  # 10.7 M parameters beside the embeddings: the usual size for a first text
    "mini": (4, 4, 256, 256),  # learns within minutes on a laptop
    "micro": (2, 2, 64, 64),  # for tests
}


@dataclass(frozen=True)
class GPTConfig:
    """What a `GPT` is built from.

    Dropout is 0 by default, where GPT-2's own files say 0.1: text that is seen about once needs none.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)!r}")
        if not self.layer_norm_epsilon > 0:
            raise ValueError(f"layer_norm_epsilon must be above 0, got {self.layer_norm_epsilon!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "GPTConfig":
        """A named size: gpt2, gpt2-medium, gpt2-large, gpt2-xl, nano, mini or micro; `overrides` replace its fields."""
        if name not in PRESETS:
            raise UserError(f"no preset {name!r}: take one of {', '.join(PRESETS)}")
        n_layer, n_head, n_embd, n_positions = PRESETS[name]
        return replace(cls(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=n_positions), **overrides)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding inside the model: the next multiple of 64, which matrix kernels like."""
        return -(-self.vocab_size // 64) * 64

    def num_parameters(self) -> int:
        """Trainable numbers, embeddings included, padding not; a tied classifier counts once."""
        C, V = self.n_embd, self.vocab_size
        block = 12 * C * C + 13 * C  # qkv 3CC+3C, attention out CC+C, mlp 8CC+5C, two norms 4C
        head = 0 if self.tie_word_embeddings else V * C
        return V * C + self.n_positions * C + self.n_layer * block + 2 * C + head

    def flops_per_token(self, block_size: int) -> float:
        """FLOPs of training on one token, forward and backward (Chowdhery et al. 2022, appendix B).

        6 for each weight that a token is multiplied with (the embeddings' look-ups are not, the classifier is), and
        12 * n_layer * n_embd * block_size for the scores and the weighted sum of attention, as if it were not causal.
        """
        weights = 12 * self.n_layer * self.n_embd**2 + self.vocab_size * self.n_embd
        return 6.0 * weights + 12.0 * self.n_layer * self.n_embd * block_size

    def to_hf(self) -> dict[str, Any]:
        """As the `config.json` of a Hugging Face GPT-2 folder."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            **asdict(self),
            "n_ctx": self.n_positions,
            "n_inner": None,
            "initializer_range": 0.02,
        }

    @classmethod
    def from_hf(cls, values: dict[str, Any], source: str) -> "GPTConfig":
        """Reads a Hugging Face GPT-2 `config.json`; `source` names it in errors.

        Raises:
            UserError: it is no GPT-2, or a GPT-2 with something that this model does not compute; names the field.
        """
        if values.get("model_type") != "gpt2":
            raise UserError(f"{source}: model_type is {values.get('model_type')!r}, only 'gpt2' can be loaded")
        activation = values.get("activation_function", "gelu_new")
        if activation not in ("gelu_new", "gelu_pytorch_tanh"):
            raise UserError(f"{source}: activation_function is {activation!r}, only 'gelu_new' can be loaded")
        for name, needed in (
            ("scale_attn_weights", True),
            ("scale_attn_by_inverse_layer_idx", False),
            ("add_cross_attention", False),
        ):
            if values.get(name, needed) != needed:
                raise UserError(f"{source}: {name} is {values[name]}, only {needed} can be loaded")
        known = {f.name for f in fields(cls)}
        given = {k: v for k, v in values.items() if k in known and v is not None}
        hf_default = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}  # what an HF file that is silent means
        try:
            config = cls(**{**hf_default, **given})
        except (TypeError, ValueError) as error:
            raise UserError(f"{source}: {error}") from None
        if values.get("n_inner") not in (None, 4 * config.n_embd):
            raise UserError(
                f"{source}: n_inner is {values['n_inner']}, only 4 * n_embd = {4 * config.n_embd} can be loaded"
            )
        return config
