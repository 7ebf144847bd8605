"""Lightning's Trainer, automatic and manual, and Fabric, against a plain loop."""

import pytest
import torch
from models import TwoLayers, trainable, with_adapter_in_float32, with_lora
from torch import nn

pytest.importorskip("lightning", reason="lightning is not installed")

import lightning
from lightning.fabric import Fabric
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy

from scalora import ChangedBaseError, ScaLora, ScaLoraConfig, StateError, UnsupportedOptimizerError
from scalora.integrations.lightning import ScaLoraCallback

KINDS = ["factored", "dense", "dense in bfloat16"]
BATCHES = [(torch.randn(8, 12, generator=torch.Generator().manual_seed(i)), torch.randn(8, 6)) for i in range(12)]


def adapted(kind="dense"):
    model = with_lora(TwoLayers(), r=2, target_modules=["first", "second"])
    return with_adapter_in_float32(model.bfloat16()) if kind.endswith("bfloat16") else model


def config_of(kind="dense"):
    return ScaLoraConfig(merge=kind.split(" ")[0], warmup_steps=1, interval=2, remainder_rank=4)


def loss_of(model, batch):
    x, y = batch
    return (model(x.to(next(model.parameters()).dtype)).float() - y).square().mean()


class Module(lightning.LightningModule):
    def __init__(self, kind="dense"):
        super().__init__()
        self.model = adapted(kind)
        self.head = nn.Linear(2, 2)  # not trained; the module's names are not the PeftModel's

    def training_step(self, batch, index):
        return loss_of(self.model, batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(trainable(self.model), lr=1e-2)


class Manual(Module):
    """Accumulates two batches, clips, and has another optimizer beside the adapter's."""

    def __init__(self, kind="dense"):
        super().__init__(kind)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        other, optimizer = self.optimizers()
        self.manual_backward(loss_of(self.model, batch) / 2)
        if index % 2:
            self.clip_gradients(optimizer, 0.05, "norm")
            optimizer.step()
            optimizer.zero_grad()
            other.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.head.parameters(), lr=0.1), super().configure_optimizers()]


def trainer_of(tmp_path, callback, **settings):
    return lightning.Trainer(
        **{
            "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 1,
            "enable_progress_bar": False, "enable_model_summary": False, "callbacks": [callback],
            "default_root_dir": tmp_path,
        } | settings
    )  # fmt: skip


def fit(module, tmp_path, kind="dense", ckpt_path=None, **settings):
    callback = ScaLoraCallback(config_of(kind))
    trainer = trainer_of(tmp_path, callback, **settings)
    trainer.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None), ckpt_path=ckpt_path)
    return callback.engine, trainer


def plain_loop(kind="dense"):
    """Accumulates two batches and clips."""
    model = adapted(kind)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    engine = ScaLora(model, optimizer, config_of(kind))
    for i, batch in enumerate(BATCHES):
        (loss_of(model, batch) / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(trainable(model), 0.05)
            optimizer.step()
            optimizer.zero_grad()
    return model, engine


def same(model, other):
    one, two = model.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize("kind", KINDS)
def test_automatic_and_manual_optimisation_give_the_weights_of_a_plain_loop(kind, tmp_path):
    wanted, of_loop = plain_loop(kind)
    module = Module(kind)
    engine, _ = fit(module, tmp_path, kind, accumulate_grad_batches=2, gradient_clip_val=0.05)
    assert (engine.step, engine.metrics()["scalora/rescales"]) == (6, 2)
    assert engine.metrics() == of_loop.metrics()
    assert same(module.model, wanted)
    module = Manual(kind)
    engine, _ = fit(module, tmp_path, kind)
    assert engine.metrics() == of_loop.metrics()
    assert same(module.model, wanted)
    module.training_step = None
    engine.optimizer.step()
    assert engine.step == 6  # detached


@pytest.mark.slow
@pytest.mark.parametrize("make", [Module, Manual])
@pytest.mark.parametrize("kind", KINDS)
def test_fit_from_a_checkpoint_goes_on_to_the_same_weights(kind, make, tmp_path):
    wanted = make(kind)
    whole, trainer = fit(wanted, tmp_path, kind, max_epochs=2)
    first = make(kind)
    _, trainer = fit(first, tmp_path, kind)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make(kind)
    with torch.no_grad():
        for parameter in trainable(resumed):
            parameter.zero_()
    engine, _ = fit(resumed, tmp_path, kind, ckpt_path=tmp_path / "half.ckpt", max_epochs=2)
    assert engine.step == whole.step > 0
    assert engine.state_dict()["rescales"] == whole.state_dict()["rescales"]
    assert same(resumed.model, wanted.model)
    assert not same(first.model, wanted.model)
    if kind != "factored":
        with pytest.raises(ChangedBaseError), resumed.model.disable_adapter():
            pass
    tested = make(kind)
    tested.test_step = lambda batch, batch_idx: tested.log("loss", loss_of(tested.model, batch))
    data = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    trainer_of(tmp_path, ScaLoraCallback(config_of(kind))).test(tested, data, tmp_path / "half.ckpt", verbose=False)
    assert same(tested.model, first.model)


def test_a_checkpoint_without_scalora_is_refused(tmp_path):
    plain = trainer_of(tmp_path, lightning.Callback())
    plain.fit(Module(), torch.utils.data.DataLoader(BATCHES, batch_size=None))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(StateError, match=r"plain\.ckpt.*step 12.*without ScaLoRA"):
        fit(Module(), tmp_path, ckpt_path=tmp_path / "plain.ckpt", max_epochs=2)


def test_the_metrics_are_logged_when_lightning_logs(tmp_path):
    _, trainer = fit(Module(), tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=3)
    assert trainer.logged_metrics["scalora/rescales"] == 5
    header, *rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    column = header.split(",").index("scalora/rescales")
    assert [float(row.split(",")[column]) for row in rows] == [1, 2, 4, 5]


class OfDeepSpeed(lightning.Trainer):
    """The strategy itself can't be made without DeepSpeed."""

    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)


def test_lightnings_deepspeed_is_refused_by_name():
    trainer = OfDeepSpeed.__new__(OfDeepSpeed)
    with pytest.raises(UnsupportedOptimizerError, match="DeepSpeedStrategy is not supported: use DeepSpeed through"):
        ScaLoraCallback().on_fit_start(trainer, Module())


def test_a_module_whose_optimizer_lacks_the_adapter_is_refused(tmp_path):
    module = Module()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.head.parameters())
    with pytest.raises(ValueError, match="no optimizer of Module holds the adapter"):
        fit(module, tmp_path)


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("attached", ["before setup", "after setup"])
@pytest.mark.parametrize("kind", KINDS)
def test_fabric_gives_the_weights_of_a_plain_loop_and_resumes_exactly(kind, attached, with_closure, tmp_path):
    wanted, _ = plain_loop(kind)

    def prepared():
        fabric = Fabric(accelerator="cpu", devices=1)
        model = adapted(kind)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        if attached == "before setup":
            ScaLora(model, optimizer, config_of(kind))
        wrapped, optimizer = fabric.setup(model, optimizer)
        if attached == "after setup":
            ScaLora(wrapped, optimizer, config_of(kind))
        return fabric, model, wrapped, optimizer

    def train(fabric, model, wrapped, optimizer, batches):
        for two in zip(batches[::2], batches[1::2], strict=True):

            def closure(two=two):
                for batch in two:
                    fabric.backward(loss_of(wrapped, batch) / 2)
                fabric.clip_gradients(wrapped, optimizer, max_norm=0.05)

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            optimizer.zero_grad()

    fabric, model, wrapped, optimizer = prepared()
    train(fabric, model, wrapped, optimizer, BATCHES[:6])
    fabric.save(tmp_path / "state.ckpt", {"model": wrapped, "optimizer": optimizer})
    train(fabric, model, wrapped, optimizer, BATCHES[6:])
    assert same(model, wanted)
    fabric, model, wrapped, optimizer = prepared()
    fabric.load(tmp_path / "state.ckpt", {"model": wrapped, "optimizer": optimizer})
    train(fabric, model, wrapped, optimizer, BATCHES[6:])
    assert same(model, wanted)
