//! Lowers parsed statements to executable steps.

use super::parse::{Operand, Parsed, Space, Statement, Variable, width};
use super::run::{Block, Fault, Stop, Thread, Wait};
use super::value::{Float, Rounding, Value, to_f32};
use super::{Kernel, LOCAL, SHARED};
use half::{bf16, f16};
use std::collections::HashMap;

/// The effect of an instruction on registers and memory.
pub(super) type Action = Box<dyn Fn(&mut Thread, &Block) -> Result<(), Fault> + Send + Sync>;

pub(super) enum Step {
    Do(Action),
    /// Continues at another instruction.
    Jump(usize),
    Stop(Stop),
}

pub(super) struct Instruction {
    /// A predicate register, and whether it must be false.
    pub(super) guard: Option<(usize, bool)>,
    pub(super) step: Step,
    pub(super) text: String,
}

/// The source of a value.
#[derive(Clone, Copy)]
pub(super) enum Source {
    Register(usize),
    Bits(u64),
    Special(Special),
}

#[derive(Clone, Copy)]
pub(super) enum Special {
    Thread(usize),
    Threads(usize),
    Block(usize),
    Blocks(usize),
    Lane,
    Warp,
}

impl Source {
    #[inline(always)]
    pub(super) fn get(self, thread: &Thread, block: &Block) -> u64 {
        match self {
            Source::Register(number) => thread.registers[number],
            Source::Bits(bits) => bits,
            Source::Special(special) => u64::from(match special {
                Special::Thread(axis) => thread.index[axis],
                Special::Threads(axis) => block.grid.threads[axis],
                Special::Block(axis) => block.index[axis],
                Special::Blocks(axis) => block.grid.blocks[axis],
                Special::Lane => thread.number % 32,
                Special::Warp => thread.number / 32,
            }),
        }
    }
}

/// Names and their values while a kernel is lowered.
struct Names<'a> {
    parameters: HashMap<String, u64>,
    variables: HashMap<String, u64>,
    globals: &'a HashMap<String, u64>,
    labels: HashMap<String, usize>,
}

pub(super) fn kernel(
    name: &str,
    parsed: Parsed,
    outside: &[Variable],
    globals: &HashMap<String, u64>,
) -> Result<Kernel, String> {
    let (mut shared, mut local, mut variables) = (0usize, 0usize, HashMap::new());
    for variable in parsed.variables.iter().chain(outside) {
        let end = if variable.space == Space::Shared { &mut shared } else { &mut local };
        let at = end.next_multiple_of(variable.align);
        *end = at + variable.initial.len();
        variables.insert(variable.name.clone(), at as u64);
    }
    let parameters = parsed.parameters.iter().map(|(name, at, _)| (name.clone(), *at as u64)).collect();
    let names = Names { parameters, variables, globals, labels: parsed.labels };
    let code = parsed.statements.iter().map(|it| instruction(it, &names)).collect::<Result<Vec<_>, _>>()?;
    let waits = |it: &Instruction| matches!(it.step, Step::Stop(Stop::Barrier | Stop::Warp(_)));
    let atomic = parsed.statements.iter().any(|it| matches!(it.opcode[0].as_str(), "atom" | "red"));
    let collective = code.iter().any(waits);
    Ok(Kernel {
        name: name.to_string(),
        parameters: parsed.parameters.iter().map(|(_, at, bytes)| (*at, *bytes)).collect(),
        code,
        registers: parsed.registers,
        shared,
        local,
        collective,
        atomic,
    })
}

fn instruction(statement: &Statement, names: &Names) -> Result<Instruction, String> {
    let text = statement.text.clone();
    // An unknown instruction is an error only when it is reached: much of a module's code never runs.
    let unknown = text.clone();
    let step = step(statement, names).unwrap_or_else(|error| {
        Step::Do(Box::new(move |_, _| Err(format!("not known to the stand-in: {unknown}: {error}").into())))
    });
    Ok(Instruction { guard: statement.guard, step, text })
}

/// Dispatches on the types that instructions name.
macro_rules! by_type {
    ($kind:expr, $T:ident, $make:expr, [$($name:literal => $type:ty),*]) => {
        match $kind {
            $($name => { type $T = $type; Ok($make) })*
            other => Err(format!("type {other}")),
        }
    };
}
macro_rules! by_integer {
    ($kind:expr, $T:ident, $make:expr) => {
        by_type!($kind, $T, $make, ["u8" => u8, "b8" => u8, "s8" => i8, "u16" => u16, "b16" => u16, "s16" => i16, "u32" => u32, "b32" => u32, "s32" => i32, "u64" => u64, "b64" => u64, "s64" => i64])
    };
}
macro_rules! by_float {
    ($kind:expr, $T:ident, $make:expr) => {
        by_type!($kind, $T, $make, ["f16" => f16, "bf16" => bf16, "f32" => f32, "f64" => f64])
    };
}
macro_rules! by_any {
    ($kind:expr, $T:ident, $make:expr) => {
        by_type!($kind, $T, $make, ["u8" => u8, "b8" => u8, "s8" => i8, "u16" => u16, "b16" => u16, "s16" => i16, "u32" => u32, "b32" => u32, "s32" => i32, "u64" => u64, "b64" => u64, "s64" => i64, "f16" => f16, "bf16" => bf16, "f32" => f32, "f64" => f64, "pred" => bool])
    };
}

fn is_float(kind: &str) -> bool {
    matches!(kind, "f16" | "bf16" | "f32" | "f64")
}

/// d = f(a).
fn one<A: Value, D: Value>(d: usize, a: Source, f: impl Fn(A) -> D + Send + Sync + 'static) -> Action {
    Box::new(move |t, b| {
        t.registers[d] = f(A::of(a.get(t, b))).bits();
        Ok(())
    })
}
/// d = f(a, b).
fn two<A: Value, B: Value, D: Value>(
    d: usize,
    [a, b]: [Source; 2],
    f: impl Fn(A, B) -> D + Send + Sync + 'static,
) -> Action {
    Box::new(move |t, block| {
        t.registers[d] = f(A::of(a.get(t, block)), B::of(b.get(t, block))).bits();
        Ok(())
    })
}
/// d = f(a, b, c).
fn three<A: Value, B: Value, C: Value, D: Value>(
    d: usize,
    [a, b, c]: [Source; 3],
    f: impl Fn(A, B, C) -> D + Send + Sync + 'static,
) -> Action {
    Box::new(move |t, block| {
        let (a, b, c) = (a.get(t, block), b.get(t, block), c.get(t, block));
        t.registers[d] = f(A::of(a), B::of(b), C::of(c)).bits();
        Ok(())
    })
}

/// Integers, with arithmetic in 128 bits.
trait Integer: Value + Ord {
    const BITS: u32;
    fn wide(self) -> i128;
    /// The lowest bits.
    fn narrow(x: i128) -> Self;
    /// The nearest representable value.
    fn saturating(x: i128) -> Self;
    /// A device's result of a division by zero: all bits set, and for `rest` the dividend.
    fn divide(self, by: Self) -> Self;
    fn rest(self, by: Self) -> Self;
}
macro_rules! integer {
    ($($type:ty),*) => { $(
        impl Integer for $type {
            const BITS: u32 = <$type>::BITS;
            fn wide(self) -> i128 { self as i128 }
            fn narrow(x: i128) -> Self { x as $type }
            fn saturating(x: i128) -> Self { x.clamp(<$type>::MIN as i128, <$type>::MAX as i128) as $type }
            fn divide(self, by: Self) -> Self { if by == 0 { !0 } else { self.wrapping_div(by) } }
            fn rest(self, by: Self) -> Self { if by == 0 { self } else { self.wrapping_rem(by) } }
        }
    )* };
}
integer!(u8, i8, u16, i16, u32, i32, u64, i64);

fn integer_op<T: Integer>(op: &str, high: bool, d: usize, s: [Source; 2]) -> Result<Action, String> {
    Ok(match op {
        "add" => two::<T, T, T>(d, s, |a, b| T::narrow(a.wide() + b.wide())),
        "sub" => two::<T, T, T>(d, s, |a, b| T::narrow(a.wide() - b.wide())),
        "mul" if high => two::<T, T, T>(d, s, |a, b| T::narrow((a.wide() * b.wide()) >> T::BITS)),
        "mul" => two::<T, T, T>(d, s, |a, b| T::narrow(a.wide().wrapping_mul(b.wide()))),
        "div" => two::<T, T, T>(d, s, |a, b| a.divide(b)),
        "rem" => two::<T, T, T>(d, s, |a, b| a.rest(b)),
        "min" => two::<T, T, T>(d, s, |a, b| a.min(b)),
        "max" => two::<T, T, T>(d, s, |a, b| a.max(b)),
        "and" => two::<T, T, T>(d, s, |a, b| T::narrow(a.wide() & b.wide())),
        "or" => two::<T, T, T>(d, s, |a, b| T::narrow(a.wide() | b.wide())),
        "xor" => two::<T, T, T>(d, s, |a, b| T::narrow(a.wide() ^ b.wide())),
        "shl" => {
            two::<T, u32, T>(d, s, |a, b| if b >= T::BITS { T::narrow(0) } else { T::narrow(a.wide() << b) })
        }
        "shr" => two::<T, u32, T>(d, s, |a, b| T::narrow(a.wide() >> b.min(T::BITS))),
        _ => return Err("operation".into()),
    })
}

fn rounding(parts: &[&str]) -> Rounding {
    match () {
        () if parts.contains(&"rm") => Rounding::Down,
        () if parts.contains(&"rp") => Rounding::Up,
        () if parts.contains(&"rz") => Rounding::Zero,
        () => Rounding::Nearest,
    }
}

fn float_op<T: Float>(op: &str, d: usize, s: [Source; 2]) -> Result<Action, String> {
    // Computed in 64 bits and rounded once, so sums, products and quotients of narrower numbers are rounded correctly.
    Ok(match op {
        "add" => two::<T, T, T>(d, s, |a, b| T::narrow(a.wide() + b.wide())),
        "sub" => two::<T, T, T>(d, s, |a, b| T::narrow(a.wide() - b.wide())),
        "mul" => two::<T, T, T>(d, s, |a, b| T::narrow(a.wide() * b.wide())),
        "div" => two::<T, T, T>(d, s, |a, b| T::narrow(a.wide() / b.wide())),
        "min" => two::<T, T, T>(d, s, |a, b| T::narrow(a.wide().min(b.wide()))),
        "max" => two::<T, T, T>(d, s, |a, b| T::narrow(a.wide().max(b.wide()))),
        "copysign" => two::<T, T, T>(d, s, |a, b| T::narrow(b.wide().copysign(a.wide()))),
        _ => return Err("operation".into()),
    })
}

fn float_function<T: Float>(op: &str, d: usize, a: Source) -> Result<Action, String> {
    let of = |f: fn(f64) -> f64| one::<T, T>(d, a, move |x| T::narrow(f(x.wide())));
    Ok(match op {
        "neg" => of(|x| -x),
        "abs" => of(f64::abs),
        "sqrt" => of(f64::sqrt),
        "rsqrt" => of(|x| 1. / x.sqrt()),
        "rcp" => of(|x| 1. / x),
        "ex2" => of(f64::exp2),
        "lg2" => of(f64::log2),
        "sin" => of(f64::sin),
        "cos" => of(f64::cos),
        "tanh" => of(f64::tanh),
        _ => return Err("operation".into()),
    })
}

/// An operation on both halves of a 32-bit register.
fn in_halves<T: Float>(op: &str, d: usize, sources: &[Source]) -> Result<Action, String> {
    let halves = |bits: u64| [T::of(bits & 0xffff).wide(), T::of(bits >> 16 & 0xffff).wide()];
    let f: fn([f64; 3]) -> f64 = match op {
        "add" => |[a, b, _]| a + b,
        "sub" => |[a, b, _]| a - b,
        "mul" => |[a, b, _]| a * b,
        "fma" => |[a, b, c]| a.mul_add(b, c),
        "neg" => |[a, ..]| -a,
        "abs" => |[a, ..]| a.abs(),
        "min" => |[a, b, _]| a.min(b),
        "max" => |[a, b, _]| a.max(b),
        _ => return Err("operation".into()),
    };
    let at = |i: usize| sources.get(i).copied().unwrap_or(Source::Bits(0));
    let sources = [at(0), at(1), at(2)];
    Ok(Box::new(move |t, block| {
        let all = sources.map(|it| halves(it.get(t, block)));
        let [low, high] = [0, 1].map(|i| T::narrow(f([all[0][i], all[1][i], all[2][i]])).bits());
        t.registers[d] = high << 16 | low;
        Ok(())
    }))
}

/// The test for a comparison, given the order of two numbers; `None` if one of them is NaN.
fn compares(comparison: &str) -> Result<fn(Option<std::cmp::Ordering>) -> bool, String> {
    use std::cmp::Ordering::{Equal, Greater, Less};
    Ok(match comparison {
        "eq" => |o| o == Some(Equal),
        "ne" => |o| matches!(o, Some(Less | Greater)),
        "lt" | "lo" => |o| o == Some(Less),
        "le" | "ls" => |o| matches!(o, Some(Less | Equal)),
        "gt" | "hi" => |o| o == Some(Greater),
        "ge" | "hs" => |o| matches!(o, Some(Greater | Equal)),
        "equ" => |o| matches!(o, None | Some(Equal)),
        "neu" => |o| o != Some(Equal),
        "ltu" => |o| matches!(o, None | Some(Less)),
        "leu" => |o| o != Some(Greater),
        "gtu" => |o| matches!(o, None | Some(Greater)),
        "geu" => |o| o != Some(Less),
        "num" => |o| o.is_some(),
        "nan" => |o| o.is_none(),
        _ => return Err("comparison".into()),
    })
}

struct Reader<'a> {
    names: &'a Names<'a>,
    operands: &'a [Operand],
}

impl Reader<'_> {
    fn at(&self, i: usize) -> Result<&Operand, String> {
        self.operands.get(i).ok_or_else(|| format!("operand {i} is missing"))
    }

    fn destination(&self, i: usize) -> Result<usize, String> {
        match self.at(i)? {
            Operand::Register(number) => Ok(*number),
            other => Err(format!("a result in {other:?}")),
        }
    }

    fn source(&self, i: usize) -> Result<Source, String> {
        self.source_of(self.at(i)?)
    }

    fn sources<const N: usize>(&self, from: usize) -> Result<[Source; N], String> {
        let mut sources = [Source::Bits(0); N];
        for (i, source) in sources.iter_mut().enumerate() {
            *source = self.source(from + i)?;
        }
        Ok(sources)
    }

    fn source_of(&self, operand: &Operand) -> Result<Source, String> {
        Ok(match operand {
            Operand::Register(number) => Source::Register(*number),
            Operand::Immediate(bits) => Source::Bits(*bits),
            Operand::Name(name) => self.named(name)?,
            other => return Err(format!("a value from {other:?}")),
        })
    }

    fn named(&self, name: &str) -> Result<Source, String> {
        let axis = ["x", "y", "z"].iter().position(|axis| name.ends_with(&format!(".{axis}"))).unwrap_or(0);
        let special = match name.split('.').next().unwrap_or("") {
            "%tid" => Special::Thread(axis),
            "%ntid" => Special::Threads(axis),
            "%ctaid" => Special::Block(axis),
            "%nctaid" => Special::Blocks(axis),
            "%laneid" => Special::Lane,
            "%warpid" => Special::Warp,
            "WARP_SZ" => return Ok(Source::Bits(32)),
            _ => {
                let variables = [&self.names.variables, self.names.globals, &self.names.parameters];
                let found = variables.iter().find_map(|it| it.get(name));
                return found.map(|at| Source::Bits(*at)).ok_or_else(|| format!("{name} is not declared"));
            }
        };
        Ok(Source::Special(special))
    }

    /// An address's base and offset.
    fn address(&self, i: usize) -> Result<(Source, u64), String> {
        match self.at(i)? {
            Operand::Address(base, offset) => Ok((self.source_of(base)?, *offset as u64)),
            other => Err(format!("an address in {other:?}")),
        }
    }

    /// One or several destination registers.
    fn places(&self, i: usize) -> Result<Vec<Option<usize>>, String> {
        let place = |it: &Operand| match it {
            Operand::Register(number) => Ok(Some(*number)),
            Operand::Nowhere => Ok(None),
            other => Err(format!("a result in {other:?}")),
        };
        match self.at(i)? {
            Operand::Vector(items) => items.iter().map(place).collect(),
            other => Ok(vec![place(other)?]),
        }
    }

    fn values(&self, i: usize) -> Result<Vec<Source>, String> {
        match self.at(i)? {
            Operand::Vector(items) => items.iter().map(|it| self.source_of(it)).collect(),
            other => Ok(vec![self.source_of(other)?]),
        }
    }
}

fn step(statement: &Statement, names: &Names) -> Result<Step, String> {
    let parts: Vec<&str> = statement.opcode.iter().map(String::as_str).collect();
    let read = Reader { names, operands: &statement.operands };
    let (op, kind) = (parts[0], parts[parts.len() - 1]);
    let action: Action = match op {
        "bra" => {
            let Operand::Name(label) = read.at(0)? else { return Err("no label".into()) };
            let to = names.labels.get(label).ok_or_else(|| format!("{label} is not there"))?;
            return Ok(Step::Jump(*to));
        }
        "ret" | "exit" => return Ok(Step::Stop(Stop::Done)),
        "trap" => Box::new(|_: &mut Thread, _: &Block| Err("trap: the kernel gave up".into())),
        "call" => {
            let text = statement.text.clone();
            Box::new(move |_: &mut Thread, _: &Block| Err(format!("calls {text}").into()))
        }
        "bar" | "barrier" if parts.contains(&"warp") => {
            return Ok(Step::Stop(Stop::Warp(Wait::Sync { members: read.source(0)? })));
        }
        "bar" | "barrier" => return Ok(Step::Stop(Stop::Barrier)),
        "shfl" => return shuffle(&parts, &read),
        "membar" | "fence" | "nanosleep" | "prefetch" | "discard" => {
            Box::new(|_: &mut Thread, _: &Block| Ok(()))
        }
        "ld" | "ldu" => load(&parts, &read)?,
        "st" => store(&parts, &read)?,
        "atom" | "red" => atomic(op == "red", &parts, &read)?,
        "mov" => moves(kind, &read)?,
        "cvta" => {
            // Converts a shared or local address to a generic one, or back.
            let base = match () {
                () if parts.contains(&"shared") => SHARED,
                () if parts.contains(&"local") => LOCAL,
                () => 0,
            };
            let to = parts.contains(&"to");
            one::<u64, u64>(read.destination(0)?, read.source(1)?, move |x| {
                if to { x.wrapping_sub(base) } else { x.wrapping_add(base) }
            })
        }
        "cvt" => convert(&parts, &read)?,
        "setp" => set_predicate(&parts, &read)?,
        "set" => set(&parts, &read)?,
        "selp" => {
            let d = read.destination(0)?;
            by_any!(kind, T, three::<T, T, bool, T>(d, read.sources(1)?, |a, b, c| if c { a } else { b }))?
        }
        "not" if kind == "pred" => one::<bool, bool>(read.destination(0)?, read.source(1)?, |a| !a),
        "and" | "or" | "xor" if kind == "pred" => {
            let (d, s) = (read.destination(0)?, read.sources(1)?);
            match op {
                "and" => two::<bool, bool, bool>(d, s, |a, b| a & b),
                "or" => two::<bool, bool, bool>(d, s, |a, b| a | b),
                _ => two::<bool, bool, bool>(d, s, |a, b| a ^ b),
            }
        }
        _ => arithmetic(op, kind, &parts, &read)?,
    };
    Ok(Step::Do(action))
}

fn arithmetic(op: &str, kind: &str, parts: &[&str], read: &Reader) -> Result<Action, String> {
    let d = read.destination(0)?;
    if let "f16x2" | "bf16x2" = kind {
        let sources = (1..read.operands.len()).map(|i| read.source(i)).collect::<Result<Vec<_>, _>>()?;
        return match kind {
            "f16x2" => in_halves::<f16>(op, d, &sources),
            _ => in_halves::<bf16>(op, d, &sources),
        };
    }
    let rounding = rounding(parts);
    if rounding != Rounding::Nearest && kind == "f32" {
        return Ok(match op {
            "fma" => three::<f32, f32, f32, f32>(d, read.sources(1)?, move |a, b, c| {
                to_f32(f64::from(a).mul_add(f64::from(b), f64::from(c)), rounding)
            }),
            "add" => two::<f32, f32, f32>(d, read.sources(1)?, move |a, b| {
                to_f32(f64::from(a) + f64::from(b), rounding)
            }),
            "mul" => two::<f32, f32, f32>(d, read.sources(1)?, move |a, b| {
                to_f32(f64::from(a) * f64::from(b), rounding)
            }),
            _ => return Err("rounding".into()),
        });
    }
    let wide = parts.contains(&"wide");
    match (op, read.operands.len()) {
        ("fma" | "mad", 4) if is_float(kind) => {
            by_float!(kind, T, three::<T, T, T, T>(d, read.sources(1)?, |a, b, c| a.fma(b, c)))
        }
        ("neg" | "abs" | "sqrt" | "rsqrt" | "rcp" | "ex2" | "lg2" | "sin" | "cos" | "tanh", 2)
            if is_float(kind) =>
        {
            by_float!(kind, T, float_function::<T>(op, d, read.source(1)?)?)
        }
        (_, 3) if is_float(kind) => by_float!(kind, T, float_op::<T>(op, d, read.sources(1)?)?),
        // The product at twice the width fits into 64 bits.
        ("mul", 3) if wide => {
            by_integer!(kind, T, two::<T, T, i64>(d, read.sources(1)?, |a, b| (a.wide() * b.wide()) as i64))
        }
        ("mad", 4) if wide => by_integer!(
            kind,
            T,
            three::<T, T, i64, i64>(d, read.sources(1)?, |a, b, c| {
                ((a.wide() * b.wide()) as i64).wrapping_add(c)
            })
        ),
        ("mad", 4) => by_integer!(
            kind,
            T,
            three::<T, T, T, T>(d, read.sources(1)?, |a, b, c| {
                T::narrow(a.wide().wrapping_mul(b.wide()) + c.wide())
            })
        ),
        ("neg", 2) => by_integer!(kind, T, one::<T, T>(d, read.source(1)?, |a| T::narrow(-a.wide()))),
        ("abs", 2) => by_integer!(kind, T, one::<T, T>(d, read.source(1)?, |a| T::narrow(a.wide().abs()))),
        ("not", 2) => by_integer!(kind, T, one::<T, T>(d, read.source(1)?, |a| T::narrow(!a.wide()))),
        ("popc", 2) => by_integer!(kind, T, one::<T, u32>(d, read.source(1)?, |a| a.bits().count_ones())),
        ("clz", 2) => by_integer!(
            kind,
            T,
            one::<T, u32>(d, read.source(1)?, |a| a.bits().leading_zeros() - (64 - T::BITS))
        ),
        ("prmt", 4) => Ok(three::<u32, u32, u32, u32>(d, read.sources(1)?, permute)),
        ("bfi", 5) => {
            let (insert, [at, len]) = (read.sources::<2>(1)?, read.sources(3)?);
            Ok(Box::new(move |t, block| {
                let (at, len) = (at.get(t, block) & 0xff, len.get(t, block) & 0xff);
                let mask = if len >= 64 { u64::MAX } else { (1 << len) - 1 };
                let [a, b] = insert.map(|it| it.get(t, block));
                let (mask, a) = if at >= 64 { (0, 0) } else { (mask << at, a << at) };
                t.registers[d] = b & !mask | a & mask;
                Ok(())
            }))
        }
        ("bfe", 4) => by_integer!(
            kind,
            T,
            three::<T, u32, u32, T>(d, read.sources(1)?, |a, at, len| {
                let (at, len) = (at & 0xff, len & 0xff);
                if len == 0 {
                    return T::narrow(0);
                }
                let cut = T::BITS.saturating_sub(at + len);
                T::narrow(T::narrow(a.wide() << cut).wide() >> (cut + at).min(T::BITS))
            })
        ),
        ("shf", 4) => {
            let left = parts.contains(&"l");
            Ok(three::<u32, u32, u32, u32>(d, read.sources(1)?, move |low, high, by| {
                let both = u64::from(high) << 32 | u64::from(low);
                if left { (both << (by & 31) >> 32) as u32 } else { (both >> (by & 31)) as u32 }
            }))
        }
        ("lop3", 5) => {
            let (sources, Source::Bits(table)) = (read.sources(1)?, read.source(4)?) else {
                return Err("table".into());
            };
            Ok(three::<u32, u32, u32, u32>(d, sources, move |a, b, c| {
                (0..32).fold(0, |all, i| {
                    let row = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1);
                    all | ((table as u32 >> row & 1) << i)
                })
            }))
        }
        (_, 3) => by_integer!(kind, T, integer_op::<T>(op, parts.contains(&"hi"), d, read.sources(1)?)?),
        _ => Err("instruction".into()),
    }
}

/// Picks four of eight bytes.
fn permute(a: u32, b: u32, pick: u32) -> u32 {
    let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
    u32::from_le_bytes([0, 4, 8, 12].map(|at| {
        let (byte, sign) = (bytes[(pick >> at & 7) as usize], pick >> at & 8 != 0);
        if sign { (byte as i8 >> 7) as u8 } else { byte }
    }))
}

/// The base address of a load or store's memory space.
fn space(parts: &[&str]) -> u64 {
    match () {
        () if parts.contains(&"shared") => SHARED,
        () if parts.contains(&"local") => LOCAL,
        () => 0,
    }
}

fn load(parts: &[&str], read: &Reader) -> Result<Action, String> {
    let kind = parts[parts.len() - 1];
    let (places, (base, offset), bytes) = (read.places(0)?, read.address(1)?, width(kind).ok_or("type")?);
    let signed = kind.starts_with('s');
    let value = move |bytes: &[u8]| {
        let mut all = [if signed && bytes[bytes.len() - 1] >> 7 == 1 { 0xff } else { 0 }; 8];
        all[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(all)
    };
    if parts.contains(&"param") {
        return Ok(Box::new(move |t, b| {
            let at = base.get(t, b).wrapping_add(offset) as usize;
            for (i, place) in places.iter().enumerate() {
                let from = at + i * bytes;
                let found = b.parameters.get(from..from + bytes).ok_or("a parameter that is not there")?;
                if let Some(place) = place {
                    t.registers[*place] = value(found);
                }
            }
            Ok(())
        }));
    }
    let space = space(parts);
    Ok(Box::new(move |t, b| {
        let at = base.get(t, b).wrapping_add(offset).wrapping_add(space);
        let from = b.locate(t, at, bytes * places.len())?;
        for (i, place) in places.iter().enumerate() {
            if let Some(place) = place {
                // SAFETY: `locate` checked this many bytes.
                t.registers[*place] =
                    value(unsafe { std::slice::from_raw_parts(from.add(i * bytes), bytes) });
            }
        }
        Ok(())
    }))
}

fn store(parts: &[&str], read: &Reader) -> Result<Action, String> {
    if parts.contains(&"param") {
        return Err("functions".into());
    }
    let bytes = width(parts[parts.len() - 1]).ok_or("type")?;
    let ((base, offset), values, space) = (read.address(0)?, read.values(1)?, space(parts));
    Ok(Box::new(move |t, b| {
        let at = base.get(t, b).wrapping_add(offset).wrapping_add(space);
        let to = b.locate(t, at, bytes * values.len())?;
        for (i, value) in values.iter().enumerate() {
            let value = value.get(t, b).to_le_bytes();
            // SAFETY: `locate` checked this many bytes.
            unsafe { to.add(i * bytes).copy_from_nonoverlapping(value.as_ptr(), bytes) };
        }
        Ok(())
    }))
}

fn atomic(nameless: bool, parts: &[&str], read: &Reader) -> Result<Action, String> {
    let kind = parts[parts.len() - 1];
    let first = usize::from(!nameless);
    let d = if nameless || read.at(0)? == &Operand::Nowhere { None } else { Some(read.destination(0)?) };
    let ((base, offset), a, space) = (read.address(first)?, read.source(first + 1)?, space(parts));
    let b = read.source(first + 2).unwrap_or(Source::Bits(0));
    let op = *parts
        .iter()
        .find(|it| matches!(**it, "add" | "cas" | "exch" | "min" | "max" | "and" | "or"))
        .ok_or("operation")?;
    fn integers<T: Integer>(op: &str) -> fn(u64, u64, u64) -> u64 {
        match op {
            "add" => |old, a, _| T::narrow(T::of(old).wide() + T::of(a).wide()).bits(),
            "min" => |old, a, _| T::narrow(T::of(old).wide().min(T::of(a).wide())).bits(),
            "max" => |old, a, _| T::narrow(T::of(old).wide().max(T::of(a).wide())).bits(),
            "and" => |old, a, _| old & a,
            "or" => |old, a, _| old | a,
            "cas" => |old, a, b| if T::of(old).wide() == T::of(a).wide() { b } else { old },
            _ => |_, a, _| a,
        }
    }
    fn floats<T: Float>(op: &str) -> fn(u64, u64, u64) -> u64 {
        match op {
            "add" => |old, a, _| T::narrow(T::of(old).wide() + T::of(a).wide()).bits(),
            _ => |_, a, _| a,
        }
    }
    let f = match is_float(kind) {
        true => by_float!(kind, T, floats::<T>(op))?,
        false => by_integer!(kind, T, integers::<T>(op))?,
    };
    let bytes = width(kind).ok_or("type")?;
    Ok(Box::new(move |t, block| {
        let at = base.get(t, block).wrapping_add(offset).wrapping_add(space);
        let place = block.locate(t, at, bytes)?;
        let mut old = [0; 8];
        // SAFETY: `locate` checked this many bytes.
        unsafe { old.as_mut_ptr().copy_from_nonoverlapping(place, bytes) };
        let old = u64::from_le_bytes(old);
        let new = f(old, a.get(t, block), b.get(t, block)).to_le_bytes();
        // SAFETY: as above.
        unsafe { place.copy_from_nonoverlapping(new.as_ptr(), bytes) };
        if let Some(d) = d {
            t.registers[d] = old;
        }
        Ok(())
    }))
}

fn moves(kind: &str, read: &Reader) -> Result<Action, String> {
    let bits = width(kind).ok_or("type")? * 8;
    let is_vector = |i| matches!(read.at(i), Ok(Operand::Vector(_)));
    if is_vector(0) {
        let (places, a) = (read.places(0)?, read.source(1)?);
        let each = bits / places.len();
        return Ok(Box::new(move |t, b| {
            let all = a.get(t, b);
            for (i, place) in places.iter().enumerate() {
                if let Some(place) = place {
                    t.registers[*place] = all >> (i * each) & (u64::MAX >> (64 - each));
                }
            }
            Ok(())
        }));
    }
    let (d, values) = (read.destination(0)?, read.values(1)?);
    if is_vector(1) {
        let each = bits / values.len();
        return Ok(Box::new(move |t, b| {
            let part = |value: &Source| value.get(t, b) & (u64::MAX >> (64 - each));
            t.registers[d] = values.iter().rev().fold(0, |all, value| all << each | part(value));
            Ok(())
        }));
    }
    let a = values[0];
    Ok(Box::new(move |t, b| {
        t.registers[d] = a.get(t, b);
        Ok(())
    }))
}

fn set_predicate(parts: &[&str], read: &Reader) -> Result<Action, String> {
    let kind = parts[parts.len() - 1];
    let holds = compares(parts[1])?;
    let (d, other) = match read.at(0)? {
        Operand::Pair(d, other) => match (&**d, &**other) {
            (Operand::Register(d), Operand::Register(other)) => (*d, Some(*other)),
            (Operand::Register(d), _) => (*d, None),
            _ => return Err("results".into()),
        },
        Operand::Register(d) => (*d, None),
        _ => return Err("result".into()),
    };
    let [a, b] = read.sources(1)?;
    let compare = match is_float(kind) {
        true => by_float!(kind, T, ordering_of(a, b, |a: T, b: T| a.wide().partial_cmp(&b.wide())))?,
        false => by_integer!(kind, T, ordering_of(a, b, |a: T, b: T| Some(a.cmp(&b))))?,
    };
    // `setp.lt.and.f32 p, a, b, c` combines both conditions.
    let (with, negated) = match read.operands.get(3) {
        Some(Operand::Not(it)) => (Some(read.source_of(it)?), true),
        Some(it) => (Some(read.source_of(it)?), false),
        None => (None, false),
    };
    let combine: fn(bool, bool) -> bool = match parts[2] {
        "and" => |a, b| a & b,
        "or" => |a, b| a | b,
        "xor" => |a, b| a ^ b,
        _ => |a, _| a,
    };
    Ok(Box::new(move |t, block| {
        let (found, with) =
            (holds(compare(t, block)), with.is_some_and(|it| (it.get(t, block) & 1 == 1) != negated));
        t.registers[d] = u64::from(combine(found, with));
        if let Some(other) = other {
            t.registers[other] = u64::from(combine(!found, with));
        }
        Ok(())
    }))
}

type Ordering = Option<std::cmp::Ordering>;
type Compare = Box<dyn Fn(&Thread, &Block) -> Ordering + Send + Sync>;

fn ordering_of<T: Value>(a: Source, b: Source, f: fn(T, T) -> Ordering) -> Compare {
    Box::new(move |t, block| f(T::of(a.get(t, block)), T::of(b.get(t, block))))
}

/// `set.eq.f16.f16 d, a, b`: 1 or all bits set if the comparison holds.
fn set(parts: &[&str], read: &Reader) -> Result<Action, String> {
    let (to, kind) = (parts[parts.len() - 2], parts[parts.len() - 1]);
    let (holds, d, [a, b]) = (compares(parts[1])?, read.destination(0)?, read.sources(1)?);
    let compare = match is_float(kind) {
        true => by_float!(kind, T, ordering_of(a, b, |a: T, b: T| a.wide().partial_cmp(&b.wide())))?,
        false => by_integer!(kind, T, ordering_of(a, b, |a: T, b: T| Some(a.cmp(&b))))?,
    };
    let yes = match is_float(to) {
        true => by_float!(to, T, T::narrow(1.).bits())?,
        false => u64::from(u32::MAX),
    };
    Ok(Box::new(move |t, block| {
        t.registers[d] = if holds(compare(t, block)) { yes } else { 0 };
        Ok(())
    }))
}

/// A value to convert.
enum Number {
    Integer(i128),
    Float(f64),
}

fn convert(parts: &[&str], read: &Reader) -> Result<Action, String> {
    let (to, from) = (parts[parts.len() - 2], parts[parts.len() - 1]);
    let d = read.destination(0)?;
    if let "f16x2" | "bf16x2" = to {
        if from != "f32" {
            return Err("type".into());
        }
        let narrow: fn(u64) -> u64 = match to {
            "f16x2" => |x| f16::narrow(f32::of(x).wide()).bits(),
            _ => |x| bf16::narrow(f32::of(x).wide()).bits(),
        };
        return Ok(two::<u64, u64, u64>(d, read.sources(1)?, move |high, low| {
            narrow(high) << 16 | narrow(low)
        }));
    }
    fn of_integer<T: Integer>(bits: u64) -> Number {
        Number::Integer(T::of(bits).wide())
    }
    fn of_float<T: Float>(bits: u64) -> Number {
        Number::Float(T::of(bits).wide())
    }
    let number: fn(u64) -> Number = match is_float(from) {
        true => by_float!(from, T, of_float::<T> as fn(u64) -> Number)?,
        false => by_integer!(from, T, of_integer::<T> as fn(u64) -> Number)?,
    };
    // Rounds to an integer, if requested.
    let whole: fn(f64) -> f64 = match () {
        () if parts.contains(&"rni") => f64::round_ties_even,
        () if parts.contains(&"rzi") => f64::trunc,
        () if parts.contains(&"rmi") => f64::floor,
        () if parts.contains(&"rpi") => f64::ceil,
        () => |x| x,
    };
    let (saturate, rounding) = (parts.contains(&"sat"), rounding(parts));
    let bounded = move |x: f64| if saturate { if x.is_nan() { 0. } else { x.clamp(0., 1.) } } else { x };
    fn to_integer<T: Integer>(x: Number, saturate: bool, whole: fn(f64) -> f64) -> u64 {
        match x {
            Number::Integer(x) if saturate => T::saturating(x).bits(),
            Number::Integer(x) => T::narrow(x).bits(),
            Number::Float(x) => T::saturating(whole(x) as i128).bits(),
        }
    }
    let a = read.source(1)?;
    let write: Box<dyn Fn(Number) -> u64 + Send + Sync> = match to {
        "f32" => Box::new(move |x| match x {
            Number::Integer(x) => (x as f32).bits(),
            Number::Float(x) => to_f32(bounded(whole(x)), rounding).bits(),
        }),
        _ if is_float(to) => by_float!(
            to,
            T,
            Box::new(move |x| match x {
                Number::Integer(x) => T::narrow(x as f64).bits(),
                Number::Float(x) => T::narrow(bounded(whole(x))).bits(),
            }) as Box<dyn Fn(Number) -> u64 + Send + Sync>
        )?,
        _ => by_integer!(
            to,
            T,
            Box::new(move |x| to_integer::<T>(x, saturate, whole))
                as Box<dyn Fn(Number) -> u64 + Send + Sync>
        )?,
    };
    Ok(Box::new(move |t, b| {
        t.registers[d] = write(number(a.get(t, b)));
        Ok(())
    }))
}

fn shuffle(parts: &[&str], read: &Reader) -> Result<Step, String> {
    let (d, found) = match read.at(0)? {
        Operand::Pair(d, found) => match (&**d, &**found) {
            (Operand::Register(d), Operand::Register(found)) => (*d, Some(*found)),
            (Operand::Register(d), _) => (*d, None),
            _ => return Err("results".into()),
        },
        Operand::Register(d) => (*d, None),
        _ => return Err("result".into()),
    };
    let [value, by, clamp, members] = read.sources(1)?;
    let mode = parts[2].chars().next().ok_or("mode")?;
    Ok(Step::Stop(Stop::Warp(Wait::Shuffle { mode, d, found, value, by, clamp, members })))
}
