"""Make visual instructions as in MMInstruct (arXiv 2407.15838): from a folder of images, in 24 domains and four types.

`make` does all of it; the others are its steps. Each works in a folder: after an interruption the same command goes on,
and asks nothing again that was answered.
"""

EXAMPLES = """\
mpo mminstruct make mminstruct.yaml --output made                       all of it: made/meta.json, for mpo sft
mpo mminstruct collect photos --output images --image-domain folder     images of good size, once each, with their domains
mpo mminstruct caption http://localhost:8000/v1 images --output told --language en --language zh
mpo mminstruct seed told --output seeded --rounds 2
mpo mminstruct generate http://localhost:8001/v1 seeded --output made   made/mminstruct/meta.json
mpo mminstruct expand figureqa train1 --output figures                  a public set as instructions
"""
