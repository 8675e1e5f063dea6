"""``python -m epops.demo``, also under torchrun: the same as ``epops demo``."""

from ..cli import demo_main

if __name__ == "__main__":
    demo_main()
