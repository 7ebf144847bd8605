"""What `benchmarks/peft_metamathqa/run.py` needs of PEFT's benchmark, written anew: a folder of the same two files."""

UTILS = """
import json, os, tempfile
from dataclasses import asdict, dataclass, field
import torch
from transformers import get_cosine_schedule_with_warmup
from peft.utils import SAFETENSORS_WEIGHTS_NAME

WARMUP_STEP_RATIO = 0.1
RESULTS = os.path.join(os.path.dirname(__file__), "results")


@dataclass
class TrainConfig:
    optimizer_type: str = "AdamW"
    optimizer_kwargs: dict = field(default_factory=lambda: {"lr": 1e-3})
    max_steps: int = 20
    lr_scheduler: str = "cosine"
    compile: bool = False

    def __post_init__(self):
        if not hasattr(torch.optim, self.optimizer_type):
            raise ValueError(f"Invalid optimizer_type: {self.optimizer_type}")
        if self.max_steps <= 0:
            raise ValueError("Invalid max_steps")


class DummyScheduler:
    def __init__(self, lr):
        self.lr = lr

    def step(self):
        pass


def get_optimizer_and_scheduler(model, *, optimizer_type, max_steps, lr_scheduler_arg, **optimizer_kwargs):
    optimizer = getattr(torch.optim, optimizer_type)(model.parameters(), **optimizer_kwargs)
    if lr_scheduler_arg is None:
        return optimizer, DummyScheduler(optimizer_kwargs["lr"])
    return optimizer, get_cosine_schedule_with_warmup(optimizer, int(WARMUP_STEP_RATIO * max_steps), max_steps)


def get_file_size(model, *, peft_config, clean, print_fn):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return os.stat(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)).st_size


def log_to_file(*, log_data, save_dir, experiment_name, timestamp, print_fn):
    os.makedirs(save_dir, exist_ok=True)
    with open(os.path.join(save_dir, experiment_name.replace(os.path.sep, "--") + ".json"), "w") as file:
        json.dump(log_data, file)


def log_results(*, experiment_name, losses, file_size, config):
    log_data = {
        "run_info": {"experiment_name": experiment_name, "train_config": asdict(config)},
        "train_info": {"file_size": file_size, "losses": losses},
    }
    log_to_file(
        log_data=log_data, save_dir=RESULTS, experiment_name=experiment_name, timestamp="now", print_fn=print
    )
"""

RUN = """
import argparse, json, os
import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM
from utils import TrainConfig, get_file_size, get_optimizer_and_scheduler, log_results

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path_experiment")
    parser.add_argument("--clean", action="store_true")
    path = parser.parse_args().path_experiment
    assert len(path.split(os.path.sep)) == 3
    peft_config = PeftConfig.from_pretrained(path)
    given = json.load(open(os.path.join(path, "training_params.json")))
    base = given.pop("model_id")
    config = TrainConfig(**given)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), peft_config)
    optimizer, scheduler = get_optimizer_and_scheduler(
        model, optimizer_type=config.optimizer_type, max_steps=config.max_steps,
        lr_scheduler_arg=config.lr_scheduler, **config.optimizer_kwargs,
    )
    tokens = torch.randint(5, 60, (6, 12), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(config.max_steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    model.save_pretrained(os.environ["SAVED"])
    model.eval()
    with torch.no_grad():
        torch.save(model(input_ids=tokens).logits, os.path.join(os.environ["SAVED"], "logits.pt"))
    size = get_file_size(model, peft_config=peft_config, clean=True, print_fn=print)
    log_results(experiment_name="/".join(path.split(os.path.sep)[1:]), losses=losses, file_size=size, config=config)
"""
