"""Inspect, verify and prune cached reference log-probs and vision features.

With reference=cached the reference model's log-prob of every completion is stored on disk. A second epoch, a resumed
run, a sweep or a larger data set then computes only the new ones. The cache key is the content: the model's weights,
the chat template, the processor's settings, the images, the prompt and the completion. Each combination of model and
settings has a sub-folder. DIR is the folder of all sub-folders, or one of them.

With vision_features=cached the features of every image are stored likewise, by the vision tower's weights, the
processor's settings and the image.
"""

from mpo.commands.flags import arg, path

EXAMPLES = """\
mpo cache inspect runs/reference           show the model, settings, number of completions and size
mpo cache verify runs/reference            read and check every shard; exit status 1 on a problem
mpo cache prune --dry-run runs/reference   show what prune would change
mpo cache prune runs/reference             remove temporary files and damaged shards, merge small shards
"""
FOLDER = {"folder": arg("folder of the cache, or one of its sub-folders", "DIR", type=path)}
