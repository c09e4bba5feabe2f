"""Draws what student.onnx finds in street.jpg, with onnxruntime, numpy and Pillow alone."""

import ast

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw

session = onnxruntime.InferenceSession("student.onnx")
names = ast.literal_eval(session.get_modelmeta().custom_metadata_map["names"])
image = Image.open("street.jpg").convert("RGB")
pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255
draw = ImageDraw.Draw(image)
boxes, scores, labels = session.run(["boxes", "scores", "labels"], {"image": pixels})
for box, score, label in zip(boxes, scores, labels, strict=True):
    if score > 0.5:
        draw.rectangle(box.tolist(), outline="red")
        draw.text(box[:2].tolist(), f"{names[label - 1]} {score:.2f}", fill="red")
image.save("drawn.png")
