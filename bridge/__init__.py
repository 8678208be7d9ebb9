"""The method: encoders split by position, the prototype bridge, selection, alignment and the inference chain.

The ground floor of fedbridge. It never imports Flower and never opens a site's files.
"""

import os

# Same request, same bits: unless told, MKL may choose its kernel by an array's address, which no seed decides. Read by
# MKL when torch first multiplies, so it is set before anything of ours imports torch.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
