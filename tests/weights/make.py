"""Writes the files beside this: weights as PyTorch saves them. Needs torch; `python make.py`."""

from pathlib import Path

import torch

here = Path(__file__).parent
model = torch.nn.ModuleDict({"hidden": torch.nn.Linear(2, 3), "norm": torch.nn.BatchNorm1d(3)})
for i, value in enumerate(model.state_dict().values()):
    value.copy_(torch.arange(value.numel()).reshape(value.shape) + 10 * i)
state = model.state_dict()
torch.save(state, here / "state_dict.pth")
# What PyTorch Lightning's checkpoints look like: the module's own name in front, and more beside the weights.
optimizer = torch.optim.Adam(model.parameters())
model["norm"](model["hidden"](torch.ones(4, 2))).sum().backward()
model.load_state_dict(state)
optimizer.step()
for i, value in enumerate(model.state_dict().values()):
    value.copy_(torch.arange(value.numel()).reshape(value.shape) + 10 * i)
lightning = {
    "epoch": 3,
    "global_step": 1200,
    "pytorch-lightning_version": "2.5.0",
    "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()} | {"loss.weight": torch.ones(2)},
    "optimizer_states": [optimizer.state_dict()],
    "lr_schedulers": [],
    "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5), "kth_best_model_path": ""}},
    "hyper_parameters": {"lr": 1e-3, "name": "net"},
}
torch.save(lightning, here / "lightning.ckpt")
# Of a network that stays channels last: its memory is in another order.
weight = torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last)
others = {"half": torch.arange(4.0).half(), "view": torch.arange(10.0)[3:7], "turned": torch.arange(7.0)[1:].reshape(2, 3).t()}
torch.save({"weight": weight} | others, here / "channels_last.pt")
