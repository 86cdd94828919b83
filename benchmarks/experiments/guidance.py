"""Measure the effect of guidance on digits: the share of samples with the requested class, by guidance scale.

    python training/train_diffusion.py --dataset_name digits --class_conditional --model_preset ddpmpp_tiny \\
        --label_dropout 0.1 --max_train_steps 3000 --learning_rate 1e-3 --output_dir runs/guided
    python benchmarks/experiments/guidance.py runs/guided/pipeline

A support-vector machine, trained on the digits, classifies each sample. Image i has seed i at every scale. The script
also writes a picture with one row for each scale, from the same ten seeds and classes.
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
    parser.add_argument("model", help="folder of a model trained on the digits with label dropout")
    parser.add_argument("--count", type=int, default=2000, help="samples per scale (default: 2000)")
    parser.add_argument("--steps", type=int, default=18, help="sampling steps (default: 18)")
    parser.add_argument("--picture", type=Path, default=Path("runs/guidance.png"), help="default: runs/guidance.png")
    args = parser.parse_args()

    digits = load_digits()
    judge = SVC(gamma=0.001, C=10)
    held_out = cross_val_score(judge, digits.data, digits.target, cv=5).mean()
    judge.fit(digits.data, digits.target)
    pipeline = load_pipeline(args.model)
    pipeline.set_progress_bar_config(disable=True)
    labels, rows = np.array(labels_in_turn(pipeline, range(args.count))), []
    print(f"accuracy of the support-vector machine on held-out digits: {held_out:.3f}")
    print("| scale | share with the requested class | standard deviation within a class |\n|---|---|---|")
    for scale in SCALES:
        images = sample_images(pipeline, range(args.count), num_inference_steps=args.steps, guidance_scale=scale)
        found = judge.predict(images.reshape(args.count, -1) * 16)
        spread = np.mean([images[labels == label].std(0).mean() for label in range(10)])
        print(f"| {scale:g} | {(found == labels).mean():.3f} | {spread:.4f} |", flush=True)
        rows += list(images[:10])
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    image_grid(rows, 10).save(args.picture)
    print(f"Saved {args.picture}.")
