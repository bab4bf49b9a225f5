"""The mathematics of DeepSeek-V3 on one device: MLA, auxiliary-loss-free MoE, multi-token prediction, their counts."""
