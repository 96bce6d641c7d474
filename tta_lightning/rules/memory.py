"""The gradient memory layer: a tiny linear model per coordinate that learns as it is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6


class GradientMemoryLayer(nn.Module):
    """One test-time training layer with a linear memory, for many coordinates at once.

    Deng et al., "Learning to Generate Gradients for Test-Time Adaptation via Test-Time Training
    Layers", AAAI 2025, https://arxiv.org/abs/2412.16901; the layer is that of Sun et al., "Learning
    to (Learn at Test Time): RNNs with Expressive Hidden States", https://arxiv.org/abs/2407.04620.

    Each coordinate has a memory ``(W, b)`` of its own and shares everything else. A call takes one
    gradient step on how well the memory maps a key to a value, then reads the new memory::

        q, k, v = x Wq', x Wk', x Wv'
        eta     = max(0, 1 + tok) sigmoid(x w + c) / d
        l(W, b) = 1/2 || LN(k W + b) - (v - k) ||^2     LN with gamma, beta
        W', b'  = W - eta dl/dW, b - eta dl/db
        out     = LN_post(q + LN(q W' + b')) Wo'

    The gradient is in closed form, so nothing inside needs autograd, and autograd can go through
    all of it. Parameters have the names and shapes of the published code: ``W1``, ``b1`` the
    initial memory, ``ttt_norm_weight``, ``ttt_norm_bias`` gamma and beta,
    ``learnable_ttt_lr_weight``, ``learnable_ttt_lr_bias``, ``learnable_token_idx`` w, c and tok.

    Args:
        inputs: Numbers a coordinate gives, 2 in the paper.
        hidden: Width d of the memory, 8 in the paper.
        outputs: Numbers a coordinate gets.
    """

    def __init__(self, inputs: int = 2, hidden: int = 8, outputs: int = 1) -> None:
        super().__init__()
        self.hidden = hidden
        self.q_proj = nn.Linear(inputs, hidden, bias=False)
        self.k_proj = nn.Linear(inputs, hidden, bias=False)
        self.v_proj = nn.Linear(inputs, hidden, bias=False)
        self.o_proj = nn.Linear(hidden, outputs, bias=False)
        self.W1 = nn.Parameter(0.02 * torch.randn(1, hidden, hidden))
        self.b1 = nn.Parameter(torch.zeros(1, 1, hidden))
        self.ttt_norm_weight = nn.Parameter(torch.ones(1, hidden))
        self.ttt_norm_bias = nn.Parameter(torch.zeros(1, hidden))
        self.learnable_ttt_lr_weight = nn.Parameter(0.02 * torch.randn(1, 1, inputs))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.zeros(1, 1))
        self.learnable_token_idx = nn.Parameter(torch.zeros(1))
        self.post_norm = nn.LayerNorm(hidden, eps=LAYER_NORM_EPS)

    def initial_memory(self, coordinates: int) -> tuple[Tensor, Tensor]:
        """Copy the learned initial memory for each coordinate.

        Args:
            coordinates: How many, N.

        Returns:
            W ``[N, d, d]`` and b ``[N, d]``, with their graph.
        """
        width = self.hidden
        return (
            self.W1.expand(coordinates, width, width).clone(),
            self.b1[0].expand(coordinates, width).clone(),
        )

    def forward(self, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Memorise the inputs, then read.

        Args:
            x: ``[N, inputs]``.
            w: Memory ``[N, d, d]``.
            b: Memory ``[N, d]``.

        Returns:
            Outputs ``[N, outputs]`` and the new memory.
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        k_w, q_w = (torch.stack((k, q), dim=1) @ w).unbind(dim=1)
        step = self.rate(x) * self.inner_gradient(k_w + b, v - k)
        new_b = b - step
        # q W' = q W - (q . k) step: the new memory is read without a second pass over it
        read = q_w - (q * k).sum(dim=1, keepdim=True) * step + new_b
        new_w = w - k.unsqueeze(2) * step.unsqueeze(1)
        return self.o_proj(self.post_norm(q + self._norm(read))), new_w, new_b

    def rate(self, x: Tensor) -> Tensor:
        """Compute the inner learning rate eta of each coordinate.

        Args:
            x: ``[N, inputs]``.

        Returns:
            ``[N, 1]``, not negative.
        """
        gate = torch.sigmoid(x @ self.learnable_ttt_lr_weight[0].T + self.learnable_ttt_lr_bias)
        return (1 + self.learnable_token_idx).clamp(min=0) * gate / self.hidden

    def inner_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """Compute the gradient of ``1/2 || LN(z) - target ||^2`` with respect to ``z``.

        Args:
            z: ``[N, d]``.
            target: ``[N, d]``.

        Returns:
            ``[N, d]``; each row sums to zero, because LN ignores shifts of its input.
        """
        centred = z - z.mean(dim=1, keepdim=True)
        deviation = (centred.square().mean(dim=1, keepdim=True) + LAYER_NORM_EPS).sqrt()
        z_hat = centred / deviation
        error = self.ttt_norm_weight * z_hat + self.ttt_norm_bias - target
        h = error * self.ttt_norm_weight
        projected = h - h.mean(dim=1, keepdim=True) - z_hat * (h * z_hat).mean(dim=1, keepdim=True)
        return projected / deviation

    def _norm(self, z: Tensor) -> Tensor:
        weight, bias = self.ttt_norm_weight[0], self.ttt_norm_bias[0]
        return nn.functional.layer_norm(z, (self.hidden,), weight, bias, LAYER_NORM_EPS)
