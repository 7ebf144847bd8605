"""The README in the folder of a saved state: tells people what the folder holds and how to use it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalora.saving.base_name import loadable_name
from scalora.saving.files import atomic_write
from scalora.saving.state_file import STATE_FILE

README = "README.md"

# The first line of every README that scalora writes: one without it is the user's, or a model card of another library.
_MARK = "<!-- scalora writes this file with every save; delete this line to keep your changes. -->"

_TEXT = """{mark}
# The state of a ScaLoRA run

`{state_file}` holds everything that the run has trained. It is not a PEFT adapter: most of the
update lies outside the two factors of the adapter. Files named `adapter_*` in this folder are placeholders, which PEFT
refuses to load.

To make an ordinary LoRA adapter, which PEFT loads without scalora:

```
scalora export path/to/this/folder --to adapter
```

From Python, with {base_model}, in the dtype and quantisation of the run:

```python
import scalora
from transformers import AutoModelForCausalLM  # or the class that was trained

base = AutoModelForCausalLM.from_pretrained({base})
scalora.export_adapter(base, "path/to/this/folder", "my-adapter")
```

`scalora.export_merged(base, folder, output)` writes the whole model instead. To continue training, or to use the model
as it is: `model = scalora.load_model(base, folder)`.
"""


def write_readme(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a README.md for the folder of a state, unless it has one that scalora did not write.

    Args:
        folder: the folder, which exists.
        state: the state that is saved in it, from `scalora.saving.attach.state_of`.

    Raises:
        OSError: the file can't be written.
    """
    path = folder / README
    if path.exists() and not is_own_readme(path):
        return
    base = loadable_name((state["adapter"] or {}).get("base_model_name_or_path"))
    text = _TEXT.format(
        mark=_MARK,
        state_file=STATE_FILE,
        base_model=f"the base model `{base}`" if base else "the base model that the run started from",
        base=json.dumps(base or "path/to/the/base/model"),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_own_readme(path: Path) -> bool:
    """Whether `write_readme` wrote a file.

    Args:
        path: the file; need not exist.
    """
    try:
        return path.read_bytes().startswith(_MARK.encode())
    except OSError:
        return False
