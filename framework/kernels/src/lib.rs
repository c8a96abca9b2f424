//! Fast differentiable operations for candle.
