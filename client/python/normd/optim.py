"""torch.optim's update rules, run by the server in Client.step."""

from normd.v1 import optimizer_pb2


def SGD(lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False):
    """torch.optim.SGD."""
    return optimizer_pb2.Optimizer(
        sgd=optimizer_pb2.Sgd(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )
    )


def _adam(lr, betas, eps, weight_decay, amsgrad, maximize):
    return optimizer_pb2.Adam(
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        amsgrad=amsgrad,
        maximize=maximize,
    )


def Adam(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False):
    """torch.optim.Adam."""
    return optimizer_pb2.Optimizer(adam=_adam(lr, betas, eps, weight_decay, amsgrad, maximize))


def AdamW(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, maximize=False):
    """torch.optim.AdamW."""
    return optimizer_pb2.Optimizer(adamw=_adam(lr, betas, eps, weight_decay, amsgrad, maximize))
