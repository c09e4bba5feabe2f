"""Draws what student.pt finds in street.jpg, with torch, torchvision and the run's folder student/ alone."""

import student
import torch
from torchvision.io import ImageReadMode, decode_image, write_png
from torchvision.utils import draw_bounding_boxes

model = student.load("student.pt")
names = torch.load("student.pt", weights_only=True)["classes"]
image = decode_image("street.jpg", ImageReadMode.RGB)
with torch.no_grad():
    (found,) = model([image / 255])
kept = found["scores"] > 0.5
texts = [f"{names[k - 1]} {s:.2f}" for k, s in zip(found["labels"][kept], found["scores"][kept], strict=True)]
if texts:
    image = draw_bounding_boxes(image, found["boxes"][kept], texts, colors="red")
write_png(image, "drawn.png")
