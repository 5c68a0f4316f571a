"""A training loop of one's own around any nn.Module: two lines are effprof's."""

import torch
from torch import nn

import effprof


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4)
    )
    inputs, targets = torch.randn(256, 32), torch.randint(0, 4, (256,))

    effprof.apply(model, method="lowrank-restarts", rank=8, restart_every=20, from_dense=False)
    optimizer = effprof.optimizer(model, method="lowrank-restarts", lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)

    for step in range(100):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()  # refactorizes and resets moments every 20 updates, too
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0 or step == 99:
            factor = optimizer.lr_factor()
            print(f"step {step:>3}  loss {loss.item():.4f}  next learning-rate factor {factor:.3f}")


if __name__ == "__main__":
    main()
