"""How far embeddings drift with number format and batch size, against fp32 one crop at a time.

    python -m benchmarks.tolerance --crops my/faces --model ViT-B-32 --pretrained random:0

Prints one JSON object: for each format and batch size the smallest and the mean cosine, and the largest relative
difference in length, over the crops. Random weights drift as trained ones of the same network do, or less: say which
were used.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from affcache.crops.folders import find_crops
from affcache.crops.images import decode_crop
from affcache.devices import resolve_device
from affcache.encoders.encoder import Encoder
from affcache.encoders.loading import load_encoder
from benchmarks.shared import script_parser, spread


def embed(encoder: Encoder, crops: Sequence[np.ndarray], batch_size: int) -> torch.Tensor:
    """Encode the crops so many at a time; float64 (n, D)."""
    batches = [crops[i : i + batch_size] for i in range(0, len(crops), batch_size)]
    return torch.cat([encoder.encode(batch) for batch in batches]).double()


def main() -> None:
    """Measure one encoder, and print one JSON object."""
    parser = script_parser(__doc__)
    parser.add_argument("--crops", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pretrained", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--count", type=int, default=256, help="crops, spread evenly over all that are found")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "fp16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32, 256])
    arguments = parser.parse_args()
    found = find_crops([arguments.crops])
    crops = [decode_crop(found.read(row)).pixels for row in spread(len(found), arguments.count)]
    device = resolve_device(arguments.device)
    exact = load_encoder(arguments.model, arguments.pretrained, precision="fp32", device=device)
    expected = embed(exact, crops, 1)
    table = []
    for precision in arguments.precisions:
        encoder = exact.in_precision(precision)
        for batch_size in arguments.batch_sizes:
            start = time.perf_counter()
            ours = embed(encoder, crops, batch_size)
            cosine = torch.nn.functional.cosine_similarity(ours, expected, dim=1)
            length = (ours.norm(dim=1) / expected.norm(dim=1) - 1).abs().max()
            table.append(
                {
                    "precision": precision,
                    "batch_size": batch_size,
                    "smallest_cosine": float(cosine.min()),
                    "mean_cosine": float(cosine.mean()),
                    "largest_length_difference": float(length),
                    "crops_a_second": len(crops) / (time.perf_counter() - start),
                }
            )
    print(json.dumps({"model": arguments.model, "device": str(device), "crops": len(crops), "table": table}))


if __name__ == "__main__":
    main()
