# SPDX-License-Identifier: MIT
"""First and second start on many image files: seconds and peak memory of each, with them reduced,
as for CelebAMask-HQ, and cut to crops, as a user's own.

    python benchmarks/large.py [--images 20000] [--pixels 256] [--out runs/large]
"""
import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
START = '''
import resource, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import data
began = time.monotonic()
files, cache = data.image_files({folder!r}), {cache!r}
images = {call}
print(len(images), 'images,', round(time.monotonic() - began, 1), 's,',
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, 'MiB at most')
'''


def main():
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument('--images', type=int, default=20000)
    p.add_argument('--pixels', type=int, default=256)
    p.add_argument('--out', default='runs/large')
    a = p.parse_args()
    folder = Path(a.out) / 'images'
    folder.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)

    def write(i):
        image = Image.fromarray(small[i % 64]).resize((a.pixels, a.pixels))
        image.save(folder / f'{i:05d}.jpg')
    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(a.images)))
    for call in ('data.read_squares(files, 64, cache)',
                 'data.crops_of_files([(f,) for f in files], 64, 0, 0, cache)[0]'):
        code = START.format(root=str(ROOT), folder=str(folder), cache=str(Path(a.out) / 'cache'),
                            call=call)
        for start in ('first', 'second'):
            out = subprocess.run([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True,
                                 check=True).stdout
            print(f'{call}, {start} start:', out.splitlines()[-1], flush=True)


if __name__ == '__main__':
    main()
