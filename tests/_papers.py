"""The published numbers of parameters of the nets (the papers, torchvision)."""

PARAMETERS = {
    "densenet121": 7_978_856,
    "densenet161": 28_681_000,
    "densenet169": 14_149_480,
    "densenet201": 20_013_928,
    "densenet264": 33_337_704,
    "densenet_bc_100_12": 769_162,
    "densenet_bc_250_24": 15_324_406,
    "densenet_bc_190_40": 25_624_430,
    "densenet_40_12": 1_019_722,
    "densenet_100_12": 6_979_642,
    "densenet_100_24": 27_249_082,
}
