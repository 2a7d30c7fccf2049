"""Methods that compare features of a pretrained network with those of good images (survey, III-C)."""
