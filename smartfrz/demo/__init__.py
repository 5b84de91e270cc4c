"""`smartfrz demo`: one pretrained network, fine-tuned fully and with SmartFRZ by `smartfrz.comparing`.

`data` and `weights` say what is trained, without any framework; `pytorch` and `keras` make the task; `printing` shows what
came out.
"""
