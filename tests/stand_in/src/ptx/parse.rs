//! Parses PTX text into statements.

use std::collections::HashMap;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Space {
    Shared,
    Local,
    Global,
}

/// A named memory region.
#[derive(Clone, Debug)]
pub(crate) struct Variable {
    pub(crate) space: Space,
    pub(crate) name: String,
    pub(crate) align: usize,
    /// Zeros if the text gives no values.
    pub(crate) initial: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Operand {
    /// A register's number.
    Register(usize),
    /// A constant's bits.
    Immediate(u64),
    /// The name of a special register, a variable, a parameter or a label.
    Name(String),
    Address(Box<Operand>, i64),
    Vector(Vec<Operand>),
    /// Two results, `a|b`.
    Pair(Box<Operand>, Box<Operand>),
    /// `!p`.
    Not(Box<Operand>),
    /// An unused result, `_`.
    Nowhere,
}

#[derive(Debug)]
pub(crate) struct Statement {
    /// A predicate register, and whether it must be false.
    pub(crate) guard: Option<(usize, bool)>,
    /// `add.s32` is `["add", "s32"]`.
    pub(crate) opcode: Vec<String>,
    pub(crate) operands: Vec<Operand>,
    pub(crate) text: String,
}

/// A parsed kernel.
#[derive(Debug, Default)]
pub(crate) struct Parsed {
    /// Name, offset and bytes.
    pub(crate) parameters: Vec<(String, usize, usize)>,
    pub(crate) statements: Vec<Statement>,
    /// Each label's target: the number of the statement after it.
    pub(crate) labels: HashMap<String, usize>,
    pub(crate) variables: Vec<Variable>,
    pub(crate) registers: usize,
}

/// The kernels' texts by name, and the variables outside of them.
pub(crate) fn module(text: &str) -> Result<(HashMap<String, String>, Vec<Variable>), String> {
    let text = without_comments(text);
    let (mut kernels, mut variables, mut rest) = (HashMap::new(), Vec::new(), text.as_str());
    // At the top level, braces enclose a kernel, a function (which is skipped) or a list of values.
    while let Some(end) = rest.find(['{', ';']) {
        let head = rest[..end].trim();
        if rest[end..].starts_with(';') {
            variables.extend(variable(head, "")?);
            rest = &rest[end + 1..];
            continue;
        }
        let body = end + closing(&rest[end..]).ok_or("a brace is not closed")?;
        if let Some((_, entry)) = head.split_once(".entry") {
            let open = entry.find('(').ok_or("a kernel without parameters")?;
            let name = entry[..open].trim().to_string();
            kernels.insert(name, format!("{}{}", &entry[open..], &rest[end..=body]));
        } else if !head.contains(".func") {
            variables.extend(variable(head, &rest[end + 1..body])?);
        }
        rest = &rest[body + 1..];
    }
    Ok((kernels, variables))
}

fn without_comments(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

/// The position of the brace that closes the first one.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    text.bytes().position(|byte| {
        depth += i32::from(byte == b'{') - i32::from(byte == b'}');
        depth == 0
    })
}

/// Parses `.global .align 4 .b8 name[24]` and its values.
fn variable(head: &str, values: &str) -> Result<Option<Variable>, String> {
    let head = head.trim_end_matches('=').trim();
    let words: Vec<&str> = head.split_whitespace().collect();
    let space = match () {
        () if words.contains(&".shared") => Space::Shared,
        () if words.contains(&".global") || words.contains(&".const") => Space::Global,
        () => return Ok(None),
    };
    let mut tokens = Tokens::new(head);
    let variable = loop {
        match tokens.next() {
            Some(Token::Word(word)) if width(&word).is_some() => break tokens.variable(space, 1, &word)?,
            Some(Token::Word(word)) if word == ".align" => {
                let align = tokens.number()?;
                let kind = tokens.word()?;
                break tokens.variable(space, align, &kind)?;
            }
            Some(_) => {}
            None => return Err(format!("unexpected: {head}")),
        }
    };
    let mut variable = variable;
    for (to, value) in variable.initial.iter_mut().zip(values.split(',').filter(|it| !it.trim().is_empty())) {
        *to = value.trim().parse().map_err(|_| format!("{}: {value} is no byte", variable.name))?;
    }
    Ok(Some(variable))
}

/// The size of a type in bytes.
pub(crate) fn width(kind: &str) -> Option<usize> {
    Some(match kind.trim_start_matches('.') {
        "u8" | "s8" | "b8" => 1,
        "u16" | "s16" | "b16" | "f16" | "bf16" => 2,
        "u32" | "s32" | "b32" | "f32" | "f16x2" | "bf16x2" => 4,
        "u64" | "s64" | "b64" | "f64" => 8,
        "pred" => 1,
        _ => return None,
    })
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Word(String),
    Sign(char),
}

struct Tokens<'a> {
    text: &'a str,
    peeked: Option<Token>,
}

impl<'a> Tokens<'a> {
    fn new(text: &'a str) -> Self {
        Tokens { text, peeked: None }
    }

    fn next(&mut self) -> Option<Token> {
        if let Some(token) = self.peeked.take() {
            return Some(token);
        }
        self.text = self.text.trim_start();
        let first = self.text.chars().next()?;
        let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '%' | '.' | '"' | ':');
        if !is_word(first) || first == ':' {
            self.text = &self.text[first.len_utf8()..];
            return Some(Token::Sign(first));
        }
        let end = self.text.find(|c| !is_word(c)).unwrap_or(self.text.len());
        let mut word = &self.text[..end];
        // A colon is part of a word in `L1::evict_last`, and ends a label.
        if word.ends_with(':') {
            word = &word[..word.len() - 1];
        }
        self.text = &self.text[word.len()..];
        Some(Token::Word(word.to_string()))
    }

    fn peek(&mut self) -> Option<&Token> {
        if self.peeked.is_none() {
            self.peeked = self.next();
        }
        self.peeked.as_ref()
    }

    fn eat(&mut self, sign: char) -> bool {
        let found = self.peek() == Some(&Token::Sign(sign));
        if found {
            self.peeked = None;
        }
        found
    }

    fn expect(&mut self, sign: char) -> Result<(), String> {
        if self.eat(sign) { Ok(()) } else { Err(format!("expected {sign:?}, got {:?}", self.peek())) }
    }

    fn word(&mut self) -> Result<String, String> {
        match self.next() {
            Some(Token::Word(word)) => Ok(word),
            other => Err(format!("expected a word, got {other:?}")),
        }
    }

    fn number(&mut self) -> Result<usize, String> {
        let word = self.word()?;
        word.parse().map_err(|_| format!("expected a number, got {word}"))
    }

    /// Parses the rest of `.b8 name[24]`, starting with the name.
    fn variable(&mut self, space: Space, align: usize, kind: &str) -> Result<Variable, String> {
        let bytes = width(kind).ok_or_else(|| format!("{kind} is no type"))?;
        let (name, mut count) = (self.word()?, 1);
        if self.eat('[') {
            count = if self.peek() == Some(&Token::Sign(']')) { 0 } else { self.number()? };
            self.expect(']')?;
        }
        Ok(Variable { space, name, align: align.max(bytes), initial: vec![0; bytes * count] })
    }
}

/// Parses a kernel's text, starting with its parameters.
pub(crate) fn kernel(text: &str) -> Result<Parsed, String> {
    let mut tokens = Tokens::new(text);
    let mut kernel = Parsed::default();
    parameters(&mut tokens, &mut kernel)?;
    // Directives before the body, such as `.maxntid 1024, 1, 1`.
    while !tokens.eat('{') {
        tokens.next().ok_or("no body")?;
    }
    let mut scopes = vec![HashMap::new()];
    while !scopes.is_empty() {
        statement(&mut tokens, &mut kernel, &mut scopes)?;
    }
    Ok(kernel)
}

/// Parses `(.param .u64 a, .param .align 8 .b8 b[96])`.
fn parameters(tokens: &mut Tokens, kernel: &mut Parsed) -> Result<(), String> {
    tokens.expect('(')?;
    let mut end = 0usize;
    while !tokens.eat(')') {
        tokens.eat(',');
        let (mut align, mut kind) = (1, String::new());
        while let Some(Token::Word(word)) = tokens.peek().cloned() {
            if !word.starts_with('.') {
                break;
            }
            tokens.next();
            match word.as_str() {
                ".align" => align = tokens.number()?,
                word if width(word).is_some() => kind = word.to_string(),
                _ => {}
            }
        }
        let it = tokens.variable(Space::Local, align, &kind)?;
        let start = end.next_multiple_of(it.align);
        end = start + it.initial.len();
        kernel.parameters.push((it.name, start, it.initial.len()));
    }
    Ok(())
}

type Scopes = Vec<HashMap<String, usize>>;

fn statement(tokens: &mut Tokens, kernel: &mut Parsed, scopes: &mut Scopes) -> Result<(), String> {
    if tokens.eat('{') {
        scopes.push(HashMap::new());
        return Ok(());
    }
    if tokens.eat('}') {
        scopes.pop();
        return Ok(());
    }
    if tokens.eat(';') {
        return Ok(());
    }
    let guard = match tokens.eat('@') {
        true => {
            let negated = tokens.eat('!');
            let name = tokens.word()?;
            Some((register(&name, kernel, scopes), negated))
        }
        false => None,
    };
    let word = tokens.word()?;
    if tokens.eat(':') {
        kernel.labels.insert(word, kernel.statements.len());
        return Ok(());
    }
    if word.starts_with('.') {
        return directive(&word, tokens, kernel, scopes);
    }
    let (mut operands, mut text) = (Vec::new(), word.clone());
    while !tokens.eat(';') {
        tokens.eat(',');
        let operand = operand(tokens, kernel, scopes)?;
        text = format!("{text} {operand:?}");
        operands.push(operand);
    }
    let opcode = word.split('.').map(str::to_string).collect();
    kernel.statements.push(Statement { guard, opcode, operands, text });
    Ok(())
}

/// Parses `.reg .b32 %r<44>;` and other declarations.
fn directive(
    word: &str,
    tokens: &mut Tokens,
    kernel: &mut Parsed,
    scopes: &mut Scopes,
) -> Result<(), String> {
    let space = match word {
        ".shared" => Some(Space::Shared),
        ".local" => Some(Space::Local),
        _ => None,
    };
    if let Some(space) = space {
        let (mut align, mut kind) = (1, tokens.word()?);
        if kind == ".align" {
            align = tokens.number()?;
            kind = tokens.word()?;
        }
        let variable = tokens.variable(space, align, &kind)?;
        kernel.variables.push(variable);
        return tokens.expect(';');
    }
    if word.starts_with(".reg") {
        // The type may be written without a space.
        if word == ".reg" {
            tokens.word()?;
        }
        while !tokens.eat(';') {
            // Members of a family, `%r<44>`, are numbered when they occur; other registers belong to the
            // enclosing braces.
            let name = tokens.word()?;
            if tokens.eat('<') {
                tokens.number()?;
                tokens.expect('>')?;
            } else if let Some(scope) = scopes.last_mut() {
                scope.insert(name, kernel.registers);
                kernel.registers += 1;
            }
            tokens.eat(',');
        }
        return Ok(());
    }
    while !tokens.eat(';') {
        tokens.next().ok_or_else(|| format!("{word} has no end"))?;
    }
    Ok(())
}

/// The number of a register; new names get a new number.
fn register(name: &str, kernel: &mut Parsed, scopes: &mut Scopes) -> usize {
    if let Some(number) = scopes.iter().rev().find_map(|scope| scope.get(name)) {
        return *number;
    }
    let number = kernel.registers;
    kernel.registers += 1;
    if let Some(scope) = scopes.first_mut() {
        scope.insert(name.to_string(), number);
    }
    number
}

const SPECIAL: [&str; 8] =
    ["%tid", "%ntid", "%ctaid", "%nctaid", "%laneid", "%warpid", "%clock", "%activemask"];

fn operand(tokens: &mut Tokens, kernel: &mut Parsed, scopes: &mut Scopes) -> Result<Operand, String> {
    if tokens.eat('!') {
        return Ok(Operand::Not(Box::new(operand(tokens, kernel, scopes)?)));
    }
    for (open, close) in [('{', '}'), ('(', ')')] {
        if tokens.eat(open) {
            let mut items = Vec::new();
            while !tokens.eat(close) {
                tokens.eat(',');
                items.push(operand(tokens, kernel, scopes)?);
            }
            return Ok(Operand::Vector(items));
        }
    }
    if tokens.eat('[') {
        let base = operand(tokens, kernel, scopes)?;
        let sign = if tokens.eat('-') { -1 } else { 1 };
        let offset = match tokens.eat('+') || sign < 0 {
            true => {
                let sign = if tokens.eat('-') { -sign } else { sign };
                let word = tokens.word()?;
                sign * word.parse::<i64>().map_err(|_| format!("{word} is no offset"))?
            }
            false => 0,
        };
        tokens.expect(']')?;
        return Ok(Operand::Address(Box::new(base), offset));
    }
    if tokens.eat('-') {
        let word = tokens.word()?;
        let value = immediate(&word).ok_or_else(|| format!("{word} is no number"))?;
        return Ok(Operand::Immediate(value.wrapping_neg()));
    }
    let word = tokens.word()?;
    let simple = match word.as_str() {
        "_" => Operand::Nowhere,
        _ if word.starts_with(|c: char| c.is_ascii_digit()) => {
            Operand::Immediate(immediate(&word).ok_or_else(|| format!("{word} is no number"))?)
        }
        _ => {
            let family = word.split('.').next().unwrap_or("");
            let declared = scopes.iter().any(|scope| scope.contains_key(&word));
            match declared || word.starts_with('%') && !SPECIAL.contains(&family) {
                true => Operand::Register(register(&word, kernel, scopes)),
                false => Operand::Name(word),
            }
        }
    };
    if tokens.eat('|') {
        let second = operand(tokens, kernel, scopes)?;
        return Ok(Operand::Pair(Box::new(simple), Box::new(second)));
    }
    Ok(simple)
}

/// The bits of `12`, `0x7f`, `0f3F800000` or `0d3FF0000000000000`.
fn immediate(word: &str) -> Option<u64> {
    let word = word.trim_end_matches('U');
    let hexadecimal = ["0x", "0X", "0f", "0F", "0d", "0D"].iter().find_map(|it| word.strip_prefix(it));
    match hexadecimal {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => word.parse().ok(),
    }
}
