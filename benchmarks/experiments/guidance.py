"""What guidance does to samples of digits: how many are of the class that was asked for, by scale.

    python training/train_diffusion.py --dataset_name digits --class_conditional --model_preset ddpmpp_tiny \\
        --label_dropout 0.1 --max_train_steps 3000 --learning_rate 1e-3 --output_dir runs/guided
    python benchmarks/experiments/guidance.py runs/guided/pipeline

A support-vector machine, trained on the digits themselves, reads the class of each sample. Image i is made from seed i
for every scale. Leaves a picture: a row for each scale, of the same ten noises and classes.
"""

import argparse
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from cm_diffusers.sampling import image_grid, labels_in_turn, load_pipeline, sample_images


SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model of the digits")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--picture", type=Path, default=Path("runs/guidance.png"))
    args = parser.parse_args()

    digits = load_digits()
    judge = SVC(gamma=0.001, C=10)
    held_out = cross_val_score(judge, digits.data, digits.target, cv=5).mean()
    judge.fit(digits.data, digits.target)
    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    labels, rows = np.array(labels_in_turn(pipeline, range(args.count))), []
    print(f"the judge's accuracy on digits that it has not seen: {held_out:.3f}")
    print("| w | of the class asked for | standard deviation within a class |\n|---|---|---|")
    for scale in SCALES:
        images = sample_images(pipeline, range(args.count), num_inference_steps=args.steps, guidance_scale=scale)
        found = judge.predict(images.reshape(args.count, -1) * 16)
        spread = np.mean([images[labels == label].std(0).mean() for label in range(10)])
        print(f"| {scale:g} | {(found == labels).mean():.3f} | {spread:.4f} |", flush=True)
        rows += list(images[:10])
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    image_grid(rows, 10).save(args.picture)
    print(f"Saved {args.picture}.")
