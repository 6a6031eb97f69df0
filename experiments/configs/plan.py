"""Does a model fit a topology, what does a step need there: no weights, no such machine."""

from ml_collections import ConfigDict, config_dict

from experiments.configs.train import ADAPTERS, CONNECTOR, LLM

TRAINS = {
    "connector": ((CONNECTOR, 1e-3),),
    "full": ((CONNECTOR, 2e-5), (LLM, 2e-5)),
    "lora": ((CONNECTOR, 2e-5), (ADAPTERS, 2e-4)),
}


def get_config(job: str = "generate") -> ConfigDict:
    return ConfigDict(
        {
            "task": "plan",
            "job": job,  # "generate", "evaluate" (the same, but short answers) or "train"
            # Branches, one or more, and an LLM of experiments.tasks.shapes: "mgm+slime@llama-3-8b";
            # or the folder of a checkpoint, of which only the sizes are read.
            "model": "mgm+slime@llama-3-8b",
            "topology": "v5e:4x4",  # v4, v5e, v5p, v6e or tpu7x, and a shape; or h100:8 and so on
            "mask": config_dict.placeholder(str),  # "causal" or "block"; default: the model's
            "model_axis": 8,  # devices that share each product
            "fsdp": 1,  # devices that share each parameter and the batch; others the batch alone
            "batch": 16,  # rows, one picture each
            "text": 128,  # tokens of text a row
            "new_tokens": 10 if job == "evaluate" else 64,  # of an answer
            "trains": "full",  # a key of TRAINS
            "train": TRAINS,  # (pattern, rate) of the parameters that train, by key
            "rank": 128,  # of LoRA
            "remat": True,  # activations of a block are computed again in the backward pass
            "sequence": False,  # activations between blocks divided by tokens over the model axis
            # Depths of the LLM that are compiled: figures at full depth lie on the line through
            # the two, as all layers are alike. () compiles it all, which takes minutes.
            "depths": (2, 4),
            "largest": False,  # the largest batch that fits, too: compiles twice as much
            "explain": False,  # the lines of source that cost most cycles, by the TPU's compiler
            "dtype": "bfloat16",  # of parameters and computation
            "out": config_dict.placeholder(str),  # default: WORKDIR/plan.json
        }
    )
