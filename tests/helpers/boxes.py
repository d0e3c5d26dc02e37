"""A tiny folder with the layout of PASCAL VOC."""

from PIL import Image


def write_voc(root, year, split, names, difficult="0"):
    """Writes images with a dog and a person each, and lists them in `split` of `year`."""
    folder = root / year
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    for name in names:
        Image.new("RGB", (50, 40), (0, 90, 0)).save(folder / "JPEGImages" / f"{name}.jpg")
        (folder / "Annotations" / f"{name}.xml").write_text(
            "<annotation><object><name>dog</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax>"
            "<ymax>30</ymax></bndbox></object><object><name>person</name>"
            f"<difficult>{difficult}</difficult><bndbox><xmin>11</xmin><ymin>5</ymin><xmax>50</xmax><ymax>40</ymax></bndbox></object></annotation>"
        )
