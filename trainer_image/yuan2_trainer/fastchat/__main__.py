"""`torchrun ... -m yuan2_trainer.fastchat --model_name_or_path ... --data_path ...`."""

import sys

from yuan2_trainer.fastchat.process import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
