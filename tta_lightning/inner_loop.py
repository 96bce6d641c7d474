"""The functional core of MT3: losses of a task, and the steps of self-supervision inside it.

Bartler et al., "MT3: Meta Test-Time Training for Self-Supervised Test-Time Adaption", AISTATS 2022,
https://arxiv.org/abs/2103.16201. Pure functions of parameters ``name -> tensor``; no module is
changed. With the views ``a, b`` of K images, the projections z and the predictions p of a network::

    d(p, t)    = 2 - 2 <p / ||p||, t / ||t||>
    L_ssl(phi) = 1/K sum_j [ d(p_phi(a_j), sg z(b_j)) + d(p_phi(b_j), sg z(a_j)) ]
    phi^(k)    = phi^(k-1) - alpha * clip(grad L_ssl(phi^(k-1))),    phi^(0) = theta
    L(theta)   = 1/M sum_i [ CE(phi_i^(N)) + gamma * L_ssl(phi_i^(N)) ]

sg stops gradients; the targets z are those of the same parameters, so the forward pass that makes
the predictions makes them too: both views of a batch go through the network once, where the
published code runs it four times. The classifier's head gets no gradient from L_ssl and is left
out of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tta_lightning.functional import wide
from tta_lightning.models.attention import differentiable_attention
from tta_lightning.models.byol import Embedder, Embedding

Parameters = Mapping[str, Tensor]
Target = Literal["self", "meta"]
_EPSILON = 1e-12  # smallest squared norm, below which a vector has no direction


class Task(NamedTuple):
    """What the network learns a task from. ``vmap`` takes tasks with one more dimension in front.

    Attributes:
        views: ``[2, K, 3, H, W]``, two views of each image for self-supervision.
        images: ``[K, 3, H, W]``, the view of each image that is classified.
        labels: ``[K]`` int64.
    """

    views: Tensor
    images: Tensor
    labels: Tensor


class TaskLosses(NamedTuple):
    """What a task says of parameters, after the steps.

    Attributes:
        total: Scalar, ``CE + gamma * L_ssl``.
        cross_entropy: Scalar, in nats.
        ssl: Scalar in [0, 8].
        correct: Scalar, the fraction of the K images that are classified correctly.
    """

    total: Tensor
    cross_entropy: Tensor
    ssl: Tensor
    correct: Tensor


def unstack(tasks: Task) -> list[Task]:
    """Take M tasks apart."""
    return [Task(*parts) for parts in zip(*tasks, strict=True)]


def average(losses: Iterable[TaskLosses]) -> TaskLosses:
    """Average losses over tasks; detached."""
    parts = zip(*losses, strict=True)
    return TaskLosses(*(torch.stack(part).detach().mean() for part in parts))


@dataclass(frozen=True)
class InnerLoop:
    """How a task moves the parameters.

    Attributes:
        steps: N.
        lr: alpha.
        clip: Largest L2 norm of the gradient of each tensor; None for no limit.
        first_order: Take the gradients of the steps for constants when they are differentiated.
        target: Whose projections are the targets of later steps: ``self``, those of ``phi^(k-1)``;
            ``meta``, those of theta at every step. The same thing for one step.
        engine: What differentiates: ``autograd``, or ``func``, which works inside ``vmap``.
    """

    steps: int = 1
    lr: float = 0.1
    clip: float | None = 10.0
    first_order: bool = False
    target: Target = "self"
    engine: Literal["autograd", "func"] = "autograd"


def direction_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Compute ``d(p, t)`` of each row.

    Args:
        predictions: ``[B, P]``.
        targets: ``[B, P]``.

    Returns:
        ``[B]`` in [0, 4]: 0 for the same direction, 4 for opposite ones, 2 where either is zero.
    """
    return 2 - 2 * (_unit(predictions) * _unit(targets)).sum(dim=1)


def embed(embedder: Embedder, parameters: Parameters, images: Tensor) -> Embedding:
    """Run a network with other parameters.

    Args:
        embedder: The network.
        parameters: Those to use, by their name in the embedder; its own where a name is missing.
        images: ``[B, 3, H, W]``.

    Returns:
        What its heads give.
    """
    with differentiable_attention():
        out: Embedding = torch.func.functional_call(embedder, dict(parameters), (images,))
    return out


def ssl_loss(
    embedder: Embedder, parameters: Parameters, views: Tensor, targets: Tensor | None = None
) -> Tensor:
    """Compute ``L_ssl``.

    Args:
        embedder: The network.
        parameters: phi.
        views: ``[2, K, 3, H, W]``.
        targets: Projections ``[2, K, P]`` of the views; None for those of phi itself. Constants
            either way.

    Returns:
        A scalar in [0, 8].
    """
    out = embed(embedder, parameters, views.flatten(0, 1))
    return symmetric_loss(out.predictions, out.projections if targets is None else targets)


def symmetric_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Compute ``L_ssl`` from what the heads gave.

    Args:
        predictions: ``[2K, P]``, those of the first views before those of the second.
        targets: ``[2K, P]`` or ``[2, K, P]``, projections in the same order; constants.

    Returns:
        A scalar in [0, 8].
    """
    other: Tensor = targets.detach().reshape(2, -1, targets.shape[-1]).flip(0).flatten(0, 1)
    return 2 * direction_loss(predictions, other).mean()


def clip_by_norm(gradient: Tensor, largest: float | None) -> Tensor:
    """Scale a gradient down to an L2 norm; differentiable, also where it is zero.

    Args:
        gradient: Of any shape.
        largest: The norm; None for no limit.

    Returns:
        The gradient, of this norm at most.
    """
    if largest is None:
        return gradient
    norm = torch.linalg.vector_norm(gradient)
    scaled: Tensor = gradient * (largest / norm.clamp_min(largest))
    return scaled


class Adapted(NamedTuple):
    """What the steps of a task lead to.

    Attributes:
        parameters: phi, all parameters. The classifier's head is theta's, the very same tensors.
        loss: Scalar, what the first step minimised; detached. None where there was no step.
    """

    parameters: dict[str, Tensor]
    loss: Tensor | None


def inner_adapt(
    embedder: Embedder,
    parameters: Parameters,
    views: Tensor,
    loop: InnerLoop,
    extra: Callable[[Parameters], Tensor] | None = None,
) -> Adapted:
    """Take the steps of a task: ``phi^(N)`` from theta.

    Args:
        embedder: The network.
        parameters: theta: all parameters. With ``autograd`` those that move must require gradients.
        views: ``[2, K, 3, H, W]``.
        loop: How; with ``first_order`` the result keeps a graph to theta, but none through the
            gradients.
        extra: A scalar of the parameters that is added to ``L_ssl`` in each step.

    Returns:
        phi, and the loss.
    """
    phi, targets, first = dict(parameters), None, None
    for _ in range(loop.steps):
        grads, loss, projections = _gradients(embedder, phi, views, targets, loop, extra)
        first = loss if first is None else first
        if loop.target == "meta" and targets is None:
            targets = projections
        for name, grad in grads.items():
            phi[name] = phi[name] - loop.lr * clip_by_norm(grad, loop.clip)
    return Adapted(phi, first)


def task_loss(
    embedder: Embedder, parameters: Parameters, task: Task, loop: InnerLoop, ssl_weight: float
) -> TaskLosses:
    """Compute what theta is worth on a task: the losses after its steps.

    Args:
        embedder: The network.
        parameters: theta.
        task: The same images for the steps and for the losses.
        loop: How the task moves the parameters.
        ssl_weight: gamma.

    Returns:
        Scalars with their graph.
    """
    phi = inner_adapt(embedder, parameters, task.views, loop).parameters
    return losses_at(embedder, phi, task, ssl_weight)


def losses_at(
    embedder: Embedder, parameters: Parameters, task: Task, ssl_weight: float
) -> TaskLosses:
    """Compute the losses of a task at given parameters, in one forward pass; see `task_loss`."""
    views = task.views.flatten(0, 1)
    out = embed(embedder, parameters, torch.cat([views, task.images]))
    logits = wide(out.logits[len(views) :])
    ssl = symmetric_loss(out.predictions[: len(views)], out.projections[: len(views)])
    cross_entropy = F.cross_entropy(logits, task.labels)
    correct = (logits.detach().argmax(dim=1) == task.labels).to(logits.dtype).mean()
    return TaskLosses(cross_entropy + ssl_weight * ssl, cross_entropy, ssl, correct)


def meta_loss(
    embedder: Embedder, parameters: Parameters, tasks: Task, loop: InnerLoop, ssl_weight: float
) -> TaskLosses:
    """Average :func:`task_loss` over tasks, one after the other, with the graphs of all of them.

    Args:
        embedder: The network.
        parameters: theta.
        tasks: M tasks, each field with one more dimension in front.
        loop: How a task moves the parameters.
        ssl_weight: gamma.

    Returns:
        Means over the tasks, with their graph.
    """
    losses = [task_loss(embedder, parameters, task, loop, ssl_weight) for task in unstack(tasks)]
    return TaskLosses(*(torch.stack(parts).mean() for parts in zip(*losses, strict=True)))


def meta_gradients(
    embedder: Embedder,
    trained: Parameters,
    fixed: Parameters,
    tasks: Task,
    loop: InnerLoop,
    ssl_weight: float,
) -> tuple[dict[str, Tensor], TaskLosses]:
    """Differentiate :func:`meta_loss`, all tasks at once by ``vmap``.

    The tasks are differentiated inside ``vmap``, and averaged outside. The other way round, the
    second derivatives of torch's layer normalisation are wrong (seen in torch 2.6 and 2.15).

    Args:
        embedder: The network.
        trained: The parameters to differentiate by.
        fixed: The others.
        tasks: M tasks.
        loop: Its engine must be ``func``.
        ssl_weight: gamma.

    Returns:
        Gradients by name, and means of the losses over the tasks; detached.
    """

    def one(trained: dict[str, Tensor], task: Task) -> tuple[Tensor, TaskLosses]:
        losses = task_loss(embedder, {**fixed, **trained}, task, loop, ssl_weight)
        return losses.total, TaskLosses(*(part.detach() for part in losses))

    each = torch.func.vmap(torch.func.grad(one, has_aux=True), in_dims=(None, 0))
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels of attention would run task by task
        grads, losses = each({name: value.detach() for name, value in trained.items()}, tasks)
    means = TaskLosses(*(part.mean() for part in losses))
    return {name: grad.mean(dim=0) for name, grad in grads.items()}, means


def _gradients(
    embedder: Embedder,
    phi: Parameters,
    views: Tensor,
    targets: Tensor | None,
    loop: InnerLoop,
    extra: Callable[[Parameters], Tensor] | None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Differentiate the loss of a step by what moves.

    Returns:
        Gradients by name, the loss and the projections of the views, both detached.
    """
    moving = {name: phi[name] for name in embedder.adapted()}

    def step_loss(moving: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        parameters = {**phi, **moving}
        out = embed(embedder, parameters, views.flatten(0, 1))
        loss = symmetric_loss(out.predictions, out.projections if targets is None else targets)
        if extra is not None:
            loss = loss + extra(parameters)
        return loss, (loss.detach(), out.projections.detach())

    if loop.engine == "func":
        grads, known = torch.func.grad(step_loss, has_aux=True)(moving)
        if loop.first_order:
            grads = {name: grad.detach() for name, grad in grads.items()}
        return grads, *known
    loss, known = step_loss(moving)
    found = torch.autograd.grad(
        loss, list(moving.values()), create_graph=not loop.first_order, allow_unused=True
    )
    return {n: g for n, g in zip(moving, found, strict=True) if g is not None}, *known


def _unit(vectors: Tensor) -> Tensor:
    """Divide each row ``[B, P]`` by its length; rows of zeros stay."""
    vectors = wide(vectors)
    return vectors * vectors.square().sum(dim=1, keepdim=True).clamp_min(_EPSILON).rsqrt()
