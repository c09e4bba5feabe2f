"""The commented recipe that ``gdetkd recipe init`` writes."""

from __future__ import annotations

_STARTER = """\
# gdetkd distill --recipe {path}
# My detector, distilled on my own images (COCO annotations)
#
# Commented fields are optional and show their defaults unless noted.
# Before a long run:  gdetkd recipe validate {path}
#                     gdetkd distill --recipe {path} --dry-run
# To change a field for one run:  --set train.steps=500
# Relative paths start from the folder in which you run gdetkd.

name: my-detector               # also the default name of the run folder
# seed: 0

# The images and their COCO annotations. The paths below start from root.
data:
  format: coco                  # or: yolo, voc, bdd100k, folder (no annotations), synthetic (drawn in code)
  root: data
  train: train.json
  val: val.json
  train_images: images          # folder of the training images
  val_images: images            # folder of the validation images
  # classes: [cat, dog]         # category names to use, in this order; default: all in the file

# Random changes to the training images.
augment:
  flip: 0.5                     # probability, 0 to 1
  # multi_scale: [640, 672, 704]  # short sides in pixels from which to choose; default: the student's image_size
  # max_size: 1333              # maximum long side in pixels with multi_scale
  # photometric: false          # jitter brightness, contrast, saturation and hue
  # scale_jitter: 0.0           # probability of showing the image at half to twice its size, cropped or padded
  # copy_paste: 0.0             # probability of pasting a copy of an object near it

# The small detector to train.
student:
  arch: composed                # a torchvision backbone, a feature pyramid, a head; or: torchvision, checkpoint
  backbone: resnet18            # for example mobilenet_v3_large, resnet50, resnext50_32x4d
  head: faster-rcnn             # or: cascade-rcnn, retinanet, fcos
  image_size: [480, 800]        # short side and maximum long side in pixels (default [800, 1333])
  backbone_weights: DEFAULT     # torchvision weights name (downloaded once) or a file; default: none
  # width: 64                   # ResNet: channels after the stem; MobileNet: width multiplier
  # blocks: [2, 2, 2, 2]        # number of ResNet blocks per stage
  # pyramid_channels: 256       # channels of each pyramid level
  # pyramid_levels: [2, 6]      # level l has stride 2**l pixels; default [3, 7] for retinanet and fcos
  # norm: auto                  # batch normalization: batch (trained), frozen, or auto

# The large detector to learn from. Train it on your classes first:
#   gdetkd train --recipe {path} --detector teacher --output runs/my-teacher
# Then replace this block with these two lines:
#   arch: checkpoint
#   path: runs/my-teacher
teacher:
  arch: composed
  backbone: resnet101
  head: faster-rcnn
  image_size: [480, 800]
  backbone_weights: DEFAULT

# The distillation terms, in addition to the student's own losses. `null` leaves a term out.
distill:
  sgfi:                         # imitates the teacher's features, region by region
    weight: 10
    # normalize: channel        # standardizes the teacher's features; or: scalar, none (as in the paper)
    # similarity: cosine        # how to match levels; or: product (as in the paper)
    # prior: 3                  # how strongly to favour the student's own level; 0: no preference (as in the paper)
    # warmup_steps: 0           # steps over which the weight rises from 0
  ckd: auto                     # contrasts regions; auto: if the teacher has a region embedding
                                # or {{weight: auto, gamma: 0.07, queue: 4096}} (temperature, stored embeddings)
  class_kd: auto                # teacher's class scores; auto: if both detectors are two-stage; or {{weight: 1.0}}
  box_kd: auto                  # teacher's box corrections; as class_kd
  # head_transfer: auto         # initialize the student's head from the teacher's; auto: if it fits a fresh head
  # regions:
  #   per_image: auto           # maximum number of regions per image; auto: from the head, at most 64 on a CPU

train:
  steps: 5000                   # optimizer steps
  batch_size: 8                 # images per step and process
  # accumulate: 1               # batches per step, to train on more images than fit
  optimizer:
    name: adamw                 # or: sgd (lr 0.01, momentum 0.9)
    lr: 2e-4                    # peak learning rate (default 1e-3)
    # weight_decay: 1e-4
  schedule:
    name: cosine                # or: multistep, constant
    warmup_steps: 200           # steps (default 50)
    # milestones: [0.667, 0.917]  # multistep: fractions of the run after which lr drops by gamma (0.1)
  # clip_norm: 10.0             # maximum gradient norm; null: no clipping
  # log_every: 20               # steps
  evaluate_every: 1000          # steps; default: only at the end
  # stop_after: null            # evaluations without a higher AP after which the run ends
  # ema: null                   # averages the weights, for example with the decay 0.999
  # checkpoint_every: 200       # steps

# runtime:
#   device: auto                # or: cpu, cuda
#   precision: auto             # bf16 on GPUs that support it, else fp32; or: fp32, bf16, fp16
#   compile: false              # compile the backbones with torch.compile
#   threads: auto               # number of CPU threads
#   workers: auto               # number of data loader processes
#   cache_mb: 1024              # memory for decoded images, in MiB per process
#   trackers: [tensorboard]     # also: wandb, mlflow, trackio, ... if installed
"""


def format_starter(path: str = "recipe.yaml") -> str:
    """Returns a valid, commented recipe to edit, for data with COCO annotations.

    Args:
        path: the recipe's path, for the commands in its comments.
    """
    return _STARTER.format(path=path)
