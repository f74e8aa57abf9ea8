"""Networks and texts come in; perplexities, accuracies and the damage of single sites go out, each figure an artefact."""
