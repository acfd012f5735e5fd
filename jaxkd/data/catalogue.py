"""The data sets known by name, and what can be known of each without reading it."""

from __future__ import annotations

from collections.abc import Callable
import importlib.util
import pathlib
from typing import NamedTuple

from jaxkd.data import folder
from jaxkd.errors import ConfigError


class Info(NamedTuple):
    """What can be known of a data set without reading it.

    Attributes:
      name: the name it is loaded by.
      image_shape: (height, width, channels) of every image that `load` hands out.
      num_classes: how many labels there are; labels are 0 to num_classes - 1.
      class_names: what they mean, in order. ImageNet's are WordNet ids ('n01440764').
      flip: whether an image flipped left to right still has the same label.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    flip: bool


_FASHION_MNIST = 'T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot'
_CIFAR10 = 'airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck'
_CIFAR100 = (
    'apple,aquarium_fish,baby,bear,beaver,bed,bee,beetle,bicycle,bottle,bowl,boy,bridge,bus,'
    'butterfly,camel,can,castle,caterpillar,cattle,chair,chimpanzee,clock,cloud,cockroach,couch,'
    'crab,crocodile,cup,dinosaur,dolphin,elephant,flatfish,forest,fox,girl,hamster,house,kangaroo,'
    'keyboard,lamp,lawn_mower,leopard,lion,lizard,lobster,man,maple_tree,motorcycle,mountain,'
    'mouse,mushroom,oak_tree,orange,orchid,otter,palm_tree,pear,pickup_truck,pine_tree,plain,'
    'plate,poppy,porcupine,possum,rabbit,raccoon,ray,road,rocket,rose,sea,seal,shark,shrew,skunk,'
    'skyscraper,snail,snake,spider,squirrel,streetcar,sunflower,sweet_pepper,table,tank,telephone,'
    'television,tiger,tractor,train,trout,tulip,turtle,wardrobe,whale,willow_tree,wolf,woman,worm'
)


class Entry(NamedTuple):
    """A data set's row in the table below."""

    image_shape: tuple[int, int, int]
    class_names: Callable[[], tuple[str, ...]]
    flip: bool
    sizes: tuple[int, int]  # published number of training and of test images
    # tensorflow-datasets' name of the split that is used as the test part.
    test: str = 'test'
    # Images come in all sizes: resize and crop them to image_shape.
    resize: bool = False


def _synsets() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's classes from a file in tensorflow-datasets' own wheel."""
    found = importlib.util.find_spec('tensorflow_datasets')
    if found is not None and found.origin is not None:
        path = pathlib.Path(found.origin).parent / 'datasets' / 'imagenet2012' / 'labels.txt'
        if path.is_file():
            return tuple(path.read_text().split())
    return tuple(str(label) for label in range(1000))


CATALOGUE = {
    'digits': Entry((8, 8, 1), lambda: tuple('0123456789'), False, (1257, 540)),
    'fashion_mnist': Entry(
        (28, 28, 1), lambda: tuple(_FASHION_MNIST.split(',')), True, (60_000, 10_000)
    ),
    'cifar10': Entry((32, 32, 3), lambda: tuple(_CIFAR10.split(',')), True, (50_000, 10_000)),
    'cifar100': Entry((32, 32, 3), lambda: tuple(_CIFAR100.split(',')), True, (50_000, 10_000)),
    # ImageNet's test split has no labels, so its validation split is the test part, as is usual.
    'imagenet2012': Entry(
        (224, 224, 3), _synsets, True, (1_281_167, 50_000), test='validation', resize=True
    ),
}


def info(name: str, image_size: int | None = None) -> Info:
    """Describes a data set without reading it.

    Args:
      name: in the catalogue, or 'folder:' and the path of a folder of images.
      image_size: height and width of what is made of a folder's images, which have three channels;
        None for others.

    Raises:
      ConfigError: for a name that is not in the catalogue, a folder without classes, and an
        image_size that is missing or given to a data set that has its own.
    """
    if folder.is_folder(name):
        if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1:
            why = 'say how many pixels high and wide the images of a folder are to be, such as 224'
            raise ConfigError('data.image_size', image_size, why=why)
        names = folder.class_names(name)
        return Info(name, (image_size, image_size, 3), len(names), names, flip=True)
    if name not in CATALOGUE:
        raise ConfigError('data.name', name, allowed=[*CATALOGUE, 'folder:PATH'])
    if image_size is not None:
        why = f'{name} has a size of its own; this is for folders of images'
        raise ConfigError('data.image_size', image_size, why=why)
    entry = CATALOGUE[name]
    names = entry.class_names()
    return Info(name, entry.image_shape, len(names), names, entry.flip)
