"""A trained checkpoint -> a folder that `from_pretrained`, vLLM and LMDeploy load: adapters merged, cast, checked."""
