"""Operations of the engine on any torch device: references in plain torch."""
