"""Make fashion_mnist_train_2000.npz of the full training files: the first 200 images of each class.

python -m benchmarks.data.make_cut [--data-root FOLDER]
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.data import CLASSES, CUT, CUT_PER_CLASS, load_fashion_mnist
from benchmarks.program import reports_missing_packages


@reports_missing_packages
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", help="folder with Fashion-MNIST's gz files")
    arguments = parser.parse_args()
    import numpy as np

    images, labels = load_fashion_mnist("train", arguments.data_root)
    first = [np.flatnonzero(labels == label)[:CUT_PER_CLASS] for label in range(CLASSES)]
    chosen = np.sort(np.concatenate(first))
    np.savez_compressed(CUT, images=images[chosen], labels=labels[chosen])
    print(f"{CUT}: {len(chosen)} images, {CUT.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
