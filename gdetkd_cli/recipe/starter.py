"""The recipe that ``gdetkd recipe init`` writes."""

from __future__ import annotations

_STARTER = """\
# gdetkd distill --recipe {path}
# My detector, distilled on my own images (COCO annotations)
#
# Lines that start with # are options, shown with their defaults unless they say otherwise.
# Before a long run:  gdetkd recipe validate {path}
#                     gdetkd distill --recipe {path} --dry-run
# Every field can be changed for one run:  --set train.steps=500
# Relative paths start from the folder that gdetkd is run in.

name: my-detector               # also the name of the run's folder
# seed: 0

# The images. Boxes are COCO JSON; the paths below start from root.
data:
  format: coco                  # or: voc, bdd100k, folder (no boxes), synthetic (drawn in code)
  root: data
  train: train.json
  val: val.json
  train_images: images          # folder of the training images
  val_images: images            # folder of the validation images
  # classes: [cat, dog]         # category names to use, in this order; default: all in the file

# Changes made to training images only.
augment:
  flip: 0.5                     # probability, 0 to 1
  # multi_scale: [640, 672, 704]  # short sides in pixels to choose from; default: the student's image_size
  # max_size: 1333              # longest side in pixels that multi_scale may give
  # photometric: false          # jitter brightness, contrast, saturation and hue
  # copy_paste: 0.0             # probability that an object is pasted once more near itself

# The small detector that you want.
student:
  arch: composed                # a torchvision backbone, a feature pyramid, a head; or: torchvision, checkpoint
  backbone: resnet18            # for example mobilenet_v3_large, resnet50, resnext50_32x4d
  head: faster-rcnn             # or: cascade-rcnn, retinanet, fcos
  image_size: [480, 800]        # pixels: short side, and the most the long side may have (default [800, 1333])
  backbone_weights: DEFAULT     # torchvision weights name (downloaded once) or a file; default: none
  # width: 64                   # ResNet: channels after the stem; MobileNet: width multiplier
  # blocks: [2, 2, 2, 2]        # ResNet blocks per stage
  # pyramid_channels: 256       # channels of each pyramid level
  # pyramid_levels: [2, 6]      # level l has stride 2**l pixels; default [3, 7] for retinanet and fcos
  # norm: auto                  # batch normalisation: batch (trained), frozen, or auto

# The large detector to learn from. It should know your classes, so train it first:
#   gdetkd train --recipe {path} --detector teacher --output runs/my-teacher
# and then put these two lines in the place of the block:
#   arch: checkpoint
#   path: runs/my-teacher
teacher:
  arch: composed
  backbone: resnet101
  head: faster-rcnn
  image_size: [480, 800]
  backbone_weights: DEFAULT

# What the student learns from the teacher, besides the boxes. `null` leaves a term out.
distill:
  sgfi:                         # imitates the teacher's features, region by region
    weight: 10
    # normalize: channel        # teacher features standardised per channel; or: scalar, none (the paper)
    # similarity: cosine        # how levels are matched; or: product (the paper)
    # prior: 3                  # how much the match favours the student's own level; 0: not at all (the paper)
    # warmup_steps: 0           # steps over which the weight rises from 0
  ckd: auto                     # contrast between regions; auto: where the teacher has a region embedding
                                # Or {{weight: auto, gamma: 0.07, queue: 4096}}: temperature, embeddings remembered
  class_kd: auto                # teacher's class scores; auto: where both detectors are two-stage. Or {{weight: 1.0}}
  box_kd: auto                  # teacher's box corrections; as class_kd
  # head_transfer: auto         # start the student's head from the teacher's; auto: where it fits a fresh head
  # regions:
  #   per_image: auto           # regions per image at most; auto: the head's own number, on a CPU 64 at most

train:
  steps: 5000                   # optimizer steps
  batch_size: 8                 # images per step and process
  optimizer:
    name: adamw                 # or: sgd (lr 0.01, momentum 0.9)
    lr: 2e-4                    # peak learning rate (default 1e-3)
    # weight_decay: 1e-4
  schedule:
    name: cosine                # or: multistep, constant
    warmup_steps: 200           # steps (default 50)
    # milestones: [0.667, 0.917]  # multistep: fractions of the run where lr drops by gamma (0.1)
  # clip_norm: 10.0             # largest gradient norm; null: no clipping
  # log_every: 20               # steps
  evaluate_every: 1000          # steps; default: only at the end
  # checkpoint_every: 200       # steps

# runtime:
#   device: auto                # or: cpu, cuda
#   precision: auto             # bf16 on GPUs that have it, else fp32; or: fp32, bf16, fp16
#   compile: false              # torch.compile the backbones
#   threads: auto               # CPU threads
#   workers: auto               # loader processes
#   cache_mb: 1024              # decoded images kept in memory, MiB per process
"""


def starter_recipe(path: str = "recipe.yaml") -> str:
    """A commented recipe to edit, for a data set with COCO annotations; it validates as it is.

    Args:
        path: where the user keeps it, for the commands in its comments.
    """
    return _STARTER.format(path=path)
