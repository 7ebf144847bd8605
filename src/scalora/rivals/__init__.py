"""ScaLoRA and the methods it is compared with, by the name that ``method:`` takes in a config."""

from scalora.rivals.controls import LoraGaRestart, NormalisedColumns, NoTransport
from scalora.rivals.from_peft import Dora, Hira, LoraGa, LoraPlus, Pissa, Riemannian, RsLora
from scalora.rivals.full_weights import Apollo, Full, GaLore
from scalora.rivals.lora_pro import LoraPro
from scalora.rivals.lora_rite import LoraRite
from scalora.rivals.method import Method
from scalora.rivals.mora import Mora
from scalora.rivals.reflora import RefLora, RefLoraS
from scalora.rivals.relora import ReLora
from scalora.rivals.scalora import ScaLoraMethod

METHODS: dict[str, type[Method]] = {
    "scalora": ScaLoraMethod,
    "lora": Method,
    "full": Full,
    # LoRA with another scaling, optimizer, form or start.
    "rslora": RsLora,
    "loraplus": LoraPlus,
    "dora": Dora,
    "pissa": Pissa,
    "lora_ga": LoraGa,
    "hira": Hira,
    "mora": Mora,
    "riemannian": Riemannian,
    "reflora": RefLora,
    "reflora_s": RefLoraS,
    "lora_rite": LoraRite,
    "lora_pro": LoraPro,
    # High rank by merging, or by training the base's weights with low-rank moments.
    "relora": ReLora,
    "galore": GaLore,
    "apollo": Apollo,
    # ScaLoRA with one thing replaced.
    "normalised_columns": NormalisedColumns,
    "no_transport": NoTransport,
    "lora_ga_restart": LoraGaRestart,
}
