"""Other libraries' adapter files, read and written without them.

Example:
    >>> from glora import interop
    >>> sorted(name for name in interop.__all__)
    ['load_lycoris', 'load_official', 'load_peft', 'save_lycoris', 'save_peft']
"""

from glora.interop.lycoris import load_lycoris, save_lycoris
from glora.interop.official import load_official
from glora.interop.peft import load_peft, save_peft

__all__ = ["load_lycoris", "load_official", "load_peft", "save_lycoris", "save_peft"]
