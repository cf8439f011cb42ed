"""The papers behind the methods, as BibTeX."""

LOOKBEHIND = r"""@inproceedings{mordido2024lookbehind,
  title={{Lookbehind-SAM}: k steps back, 1 step forward},
  author={Mordido, Gon{\c{c}}alo and Malviya, Pranshu and Baratin, Aristide and Chandar, Sarath},
  booktitle={International Conference on Machine Learning},
  year={2024},
  url={https://arxiv.org/abs/2307.16704}
}"""
SAM = """@inproceedings{foret2021sharpness,
  title={Sharpness-aware Minimization for Efficiently Improving Generalization},
  author={Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam},
  booktitle={International Conference on Learning Representations},
  year={2021},
  url={https://arxiv.org/abs/2010.01412}
}"""
ASAM = """@inproceedings{kwon2021asam,
  title={{ASAM}: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks},
  author={Kwon, Jungmin and Kim, Jeongseop and Park, Hyunseo and Choi, In Kwon},
  booktitle={International Conference on Machine Learning},
  year={2021},
  url={https://arxiv.org/abs/2102.11600}
}"""
LOOKAHEAD = """@inproceedings{zhang2019lookahead,
  title={Lookahead Optimizer: k steps forward, 1 step back},
  author={Zhang, Michael R. and Lucas, James and Ba, Jimmy and Hinton, Geoffrey},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019},
  url={https://arxiv.org/abs/1907.08610}
}"""
