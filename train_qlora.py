"""Fine-tune a chat model with QLoRA: `python train_qlora.py --model_name ... --dataset ...`.

`--help` lists the flags; nbs/week2/02_qlora.ipynb is the lesson about it."""
import sys

from mlcourse.qlora import main

if __name__ == "__main__": sys.exit(main())
