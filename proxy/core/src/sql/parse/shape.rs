//! The outermost SELECT as merging needs it: which items are columns, whole aggregates, or contain what cannot be merged.

use std::ops::ControlFlow;

use sqlparser::ast::{
    Distinct, DuplicateTreatment, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArguments, GroupByExpr,
    LimitClause, OrderByExpr, OrderByKind, OrderBySort, Query, Select, SelectItem as AstItem,
    SelectItemQualifiedWildcardKind as Qualifier, Visit, Visitor, WildcardAdditionalOptions, WindowType,
};

use super::analyse::{Analyser, resolve};
use super::env::{Env, NodeId};
use super::formula::formula;
use super::scope::{Column, Columns, Entry, Scope, ident, name_parts};
use super::terms::{bare, constant};
use crate::sql::facts::{
    Aggregate, ColumnFacts, Expression, Formula, ItemKind, Limit, Literal, Ordering, SelectItem, SelectShape, Term,
    WildcardColumn,
};
use crate::topology::catalog::Catalog;

/// Every aggregate of pg_catalog up to PostgreSQL 18 (pg_proc.dat, prokind 'a'); sorted.
const AGGREGATES: &[&str] = &[
    "any_value",
    "array_agg",
    "avg",
    "bit_and",
    "bit_or",
    "bit_xor",
    "bool_and",
    "bool_or",
    "corr",
    "count",
    "covar_pop",
    "covar_samp",
    "cume_dist",
    "dense_rank",
    "every",
    "grouping",
    "json_agg",
    "json_agg_strict",
    "json_arrayagg",
    "json_object_agg",
    "json_object_agg_strict",
    "json_object_agg_unique",
    "json_object_agg_unique_strict",
    "json_objectagg",
    "jsonb_agg",
    "jsonb_agg_strict",
    "jsonb_object_agg",
    "jsonb_object_agg_strict",
    "jsonb_object_agg_unique",
    "jsonb_object_agg_unique_strict",
    "max",
    "min",
    "mode",
    "percent_rank",
    "percentile_cont",
    "percentile_disc",
    "range_agg",
    "range_intersect_agg",
    "rank",
    "regr_avgx",
    "regr_avgy",
    "regr_count",
    "regr_intercept",
    "regr_r2",
    "regr_slope",
    "regr_sxx",
    "regr_sxy",
    "regr_syy",
    "stddev",
    "stddev_pop",
    "stddev_samp",
    "string_agg",
    "sum",
    "var_pop",
    "var_samp",
    "variance",
    "xmlagg",
];

/// By name alone: a plain function that shares its name with an aggregate counts as one.
fn is_aggregate(function: &Function, catalog: &Catalog) -> bool {
    let name = name_parts(&function.name).and_then(|parts| parts.last().cloned());
    name.is_some_and(|name| {
        catalog.aggregates.contains(name.as_str()) || AGGREGATES.binary_search(&name.as_str()).is_ok()
    })
}

fn is_window(function: &Function, catalog: &Catalog) -> bool {
    let name = name_parts(&function.name).and_then(|parts| parts.last().cloned());
    // rank() and its like are both; without OVER they are aggregates.
    function.over.is_some()
        || !is_aggregate(function, catalog) && name.is_some_and(|name| catalog.windows.contains(name.as_str()))
}

/// Aggregates and windows of an expression, outside its sub-queries.
struct Contents<'c> {
    catalog: &'c Catalog,
    aggregate: bool,
    window: bool,
    subquery: bool,
    collation: bool,
    depth: usize,
}

impl Visitor for Contents<'_> {
    type Break = ();

    fn pre_visit_query(&mut self, _query: &Query) -> ControlFlow<()> {
        self.depth += 1;
        self.subquery = true;
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, _query: &Query) -> ControlFlow<()> {
        self.depth -= 1;
        ControlFlow::Continue(())
    }

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        match expr {
            Expr::Function(function) if self.depth == 0 => {
                if is_window(function, self.catalog) {
                    self.window = true;
                } else if is_aggregate(function, self.catalog) {
                    self.aggregate = true;
                }
            }
            Expr::Collate { .. } => self.collation = true,
            _ => {}
        }
        ControlFlow::Continue(())
    }
}

fn contents<'c>(node: &impl Visit, catalog: &'c Catalog) -> Contents<'c> {
    let mut contents =
        Contents { catalog, aggregate: false, window: false, subquery: false, collation: false, depth: 0 };
    let _ = node.visit(&mut contents);
    contents
}

/// Does the block aggregate or number its rows?
pub fn projects_aggregate(select: &Select, catalog: &Catalog) -> bool {
    let contents = contents(&select.projection, catalog);
    contents.aggregate || contents.window
}

fn no_options(options: &WildcardAdditionalOptions) -> bool {
    options.opt_ilike.is_none()
        && options.opt_exclude.is_none()
        && options.opt_except.is_none()
        && options.opt_replace.is_none()
        && options.opt_rename.is_none()
        && options.opt_alias.is_none()
}

/// The columns of `*` or `t.*` in order, if all are known.
pub fn expand(item: &AstItem, scope: &Scope<'_>) -> Option<Vec<(usize, Column)>> {
    match item {
        AstItem::Wildcard(options) if no_options(options) => {
            if scope.merged.is_empty() {
                let all: Option<Vec<_>> = scope.entries.iter().map(entry_columns).collect();
                return Some(all?.concat());
            }
            merged_columns(scope)
        }
        AstItem::QualifiedWildcard(Qualifier::ObjectName(name), options) if no_options(options) => {
            let parts = name_parts(name)?;
            entry_columns(scope.entries.iter().find(|entry| Some(&entry.name) == parts.last())?)
        }
        _ => None,
    }
}

fn entry_columns(entry: &Entry) -> Option<Vec<(usize, Column)>> {
    match &entry.columns {
        Columns::Known(columns) => Some(columns.iter().map(|column| (entry.owner, column.clone())).collect()),
        Columns::KeyOnly(_) | Columns::Unknown => None,
    }
}

/// `*` over one join with USING: the merged columns first, then the others of the left, then of the right.
fn merged_columns(scope: &Scope<'_>) -> Option<Vec<(usize, Column)>> {
    let [left, right] = scope.entries.as_slice() else { return None };
    let mut columns = Vec::new();
    for (name, owner) in &scope.merged {
        let entry = scope.entries.iter().find(|entry| Some(entry.owner) == *owner)?;
        columns.push((entry.owner, entry.columns.get(name)?.clone()));
    }
    for entry in [left, right] {
        let others = entry_columns(entry)?;
        columns.extend(
            others.into_iter().filter(|(_, column)| !scope.merged.iter().any(|(name, _)| *name == column.name)),
        );
    }
    Some(columns)
}

fn wildcard(columns: Option<Vec<WildcardColumn>>) -> SelectItem {
    SelectItem { kind: ItemKind::Wildcard(columns), name: None, name_unsure: false, aliased: false }
}

enum OutputName {
    Name(String),
    /// `?column?`
    Nameless,
    Unsure,
}

/// The name Postgres gives an unnamed output column (FigureColname in src/backend/parser/parse_target.c).
fn output_name(expr: &Expr) -> OutputName {
    match bare(expr) {
        Expr::Identifier(name) => OutputName::Name(ident(name)),
        Expr::CompoundIdentifier(parts) => {
            parts.last().map_or(OutputName::Unsure, |name| OutputName::Name(ident(name)))
        }
        Expr::Function(function) => {
            let name = name_parts(&function.name).and_then(|mut parts| parts.pop());
            name.map_or(OutputName::Unsure, OutputName::Name)
        }
        Expr::Collate { expr, .. } => output_name(expr),
        Expr::Cast { expr, .. } => match output_name(expr) {
            OutputName::Name(name) => OutputName::Name(name),
            OutputName::Nameless | OutputName::Unsure => OutputName::Unsure,
        },
        Expr::BinaryOp { .. }
        | Expr::UnaryOp { .. }
        | Expr::Value(_)
        | Expr::IsNull(_)
        | Expr::IsNotNull(_)
        | Expr::Between { .. }
        | Expr::InList { .. }
        | Expr::Like { .. }
        | Expr::ILike { .. } => OutputName::Nameless,
        _ => OutputName::Unsure,
    }
}

/// Reads expressions of one block.
struct Reader<'r, 'a, 's> {
    analyser: &'r Analyser<'a>,
    scope: &'r Scope<'s>,
    env: &'r Env,
    core: Vec<NodeId>,
}

/// Describes the block; `None` if something in it can never be merged (then `unspreadable` says what).
pub fn shape(
    analyser: &mut Analyser<'_>,
    select: &Select,
    query: &Query,
    scope: &Scope<'_>,
    env: &Env,
) -> Option<SelectShape> {
    if let Some(why) = never_merged(select, query) {
        analyser.unspreadable(why);
        return None;
    }
    let reader = Reader { analyser, scope, env, core: analyser.core_nodes().unwrap_or_default() };
    let GroupByExpr::Expressions(group, _) = &select.group_by else { return None };
    let order: &[OrderByExpr] = match query.order_by.as_ref().map(|order| &order.kind) {
        Some(OrderByKind::Expressions(order)) => order,
        _ => &[],
    };
    let (mut limit, offset) = match &query.limit_clause {
        Some(LimitClause::LimitOffset { limit, offset, .. }) => {
            (count(limit.as_ref()), count(offset.as_ref().map(|offset| &offset.value)))
        }
        _ => (Limit::None, Limit::None),
    };
    if let Some(fetch) = &query.fetch {
        limit = match &fetch.quantity {
            Some(quantity) => count(Some(quantity)),
            None => Limit::Term(Term::Literal(Literal::Number("1".into()))),
        };
    }
    Some(SelectShape {
        items: select.projection.iter().map(|item| reader.item(item)).collect(),
        distinct: matches!(select.distinct, Some(Distinct::Distinct)),
        distinct_on: match &select.distinct {
            Some(Distinct::On(on)) => on.len(),
            _ => 0,
        },
        group: group.iter().map(|expr| reader.expression(expr)).collect(),
        having: select.having.is_some(),
        having_formula: select.having.as_ref().and_then(|having| reader.formula(having)),
        order: order.iter().map(|item| reader.ordering(item)).collect(),
        limit,
        offset,
        ties: query.fetch.as_ref().is_some_and(|fetch| fetch.with_ties),
        names_complete: scope.entries.iter().all(|entry| matches!(entry.columns, Columns::Known(_))),
    })
}

fn never_merged(select: &Select, query: &Query) -> Option<&'static str> {
    if !query.locks.is_empty() {
        return Some("FOR UPDATE or FOR SHARE");
    }
    if query.fetch.as_ref().is_some_and(|fetch| fetch.percent || fetch.with_ties && query.order_by.is_none()) {
        return Some("FETCH FIRST … PERCENT, or WITH TIES without an order");
    }
    if let Some(Distinct::On(on)) = &select.distinct
        && !leads_order(on, query)
    {
        return Some("DISTINCT ON without an ORDER BY that begins with the same expressions");
    }
    if !select.named_window.is_empty() {
        return Some("a window function");
    }
    match &select.group_by {
        GroupByExpr::Expressions(group, modifiers) => {
            let sets = |expr: &Expr| matches!(expr, Expr::GroupingSets(_) | Expr::Cube(_) | Expr::Rollup(_));
            if !modifiers.is_empty()
                || group.iter().any(sets)
                || group.iter().any(|expr| matches!(expr, Expr::Tuple(_)))
            {
                return Some("GROUPING SETS, ROLLUP or CUBE");
            }
        }
        GroupByExpr::All(_) => return Some("GROUP BY ALL"),
    }
    match query.order_by.as_ref().map(|order| &order.kind) {
        Some(OrderByKind::All(_)) => Some("ORDER BY ALL"),
        Some(OrderByKind::Expressions(order)) if order.iter().any(by_operator) => Some("ORDER BY … USING"),
        Some(OrderByKind::Expressions(_)) | None => None,
    }
}

/// Is it certain that DISTINCT ON is by the first items of ORDER BY, as many as it has? Postgres asks for that of its distinct
/// expressions, and two may be one.
fn leads_order(on: &[Expr], query: &Query) -> bool {
    let Some(OrderByKind::Expressions(order)) = query.order_by.as_ref().map(|order| &order.kind) else { return false };
    let Some(first) = order.get(..on.len()) else { return false };
    on.len() == 1
        || on.iter().enumerate().all(|(at, one)| {
            !on[..at].iter().any(|other| bare(other) == bare(one))
                && first.iter().any(|item| bare(&item.expr) == bare(one))
        })
}

fn by_operator(item: &OrderByExpr) -> bool {
    matches!(item.options.sort, Some(OrderBySort::Using(_))) || item.with_fill.is_some()
}

fn count(expr: Option<&Expr>) -> Limit {
    let Some(expr) = expr else { return Limit::None };
    match constant(expr) {
        Some(constant) if constant.cast.is_none() => Limit::Term(constant.term),
        _ => Limit::Computed,
    }
}

impl Reader<'_, '_, '_> {
    fn ordering(&self, item: &OrderByExpr) -> Ordering {
        let descending = matches!(item.options.sort, Some(OrderBySort::Desc));
        Ordering {
            expression: self.expression(&item.expr),
            descending,
            nulls_first: item.options.nulls_first.unwrap_or(descending),
        }
    }

    fn item(&self, item: &AstItem) -> SelectItem {
        match item {
            AstItem::UnnamedExpr(expr) => {
                let (name, name_unsure) = match output_name(expr) {
                    OutputName::Name(name) => (Some(name.into()), false),
                    OutputName::Nameless => (None, false),
                    OutputName::Unsure => (None, true),
                };
                SelectItem { kind: ItemKind::Expression(self.expression(expr)), name, name_unsure, aliased: false }
            }
            AstItem::ExprWithAlias { expr, alias } => SelectItem {
                kind: ItemKind::Expression(self.expression(expr)),
                name: Some(ident(alias).into()),
                name_unsure: false,
                aliased: true,
            },
            AstItem::ExprWithAliases { .. } => wildcard(None),
            AstItem::Wildcard(_) | AstItem::QualifiedWildcard(..) => {
                let columns = expand(item, self.scope).map(|columns| {
                    let named = |(owner, column): (usize, Column)| WildcardColumn {
                        name: column.name.as_str().into(),
                        column: Some(self.column(owner, &column)),
                    };
                    columns.into_iter().map(named).collect()
                });
                wildcard(columns)
            }
        }
    }

    fn column(&self, owner: usize, column: &Column) -> ColumnFacts {
        ColumnFacts {
            owner,
            name: column.name.as_str().into(),
            byte_order: column.byte_order,
            is_key: self.analyser.is_key(owner, &column.name, &self.core, self.env),
            type_oid: column.type_oid,
        }
    }

    fn column_of(&self, expr: &Expr) -> Option<ColumnFacts> {
        let found = resolve(expr, self.scope).filter(|found| found.local)?;
        Some(self.column(found.entry.owner, found.column))
    }

    fn expression(&self, expr: &Expr) -> Expression {
        let inside = contents(expr, self.analyser.schema.catalog);
        let column = self.column_of(expr);
        let aggregate = match expr {
            Expr::Function(function) => self.aggregate(function),
            _ => None,
        };
        let explicit = match bare(expr) {
            Expr::Collate { collation, .. } => Some(is_byte_collation(collation)),
            _ => None,
        };
        let byte_order = match (&column, explicit, &aggregate) {
            (Some(column), ..) => column.byte_order,
            (None, Some(bytes), _) => bytes,
            // Their result has the collation of their argument.
            (None, None, Some(Aggregate { name, argument_byte_order, .. })) if matches!(&**name, "min" | "max") => {
                *argument_byte_order
            }
            (None, None, _) => {
                !inside.collation && self.analyser.schema.catalog.database_byte_order && self.all_byte_order(expr)
            }
        };
        let formula = (inside.aggregate && aggregate.is_none()).then(|| self.formula(expr)).flatten();
        Expression {
            column,
            bare_name: match expr {
                Expr::Identifier(name) => Some(ident(name).into()),
                _ => None,
            },
            value: match bare(expr) {
                Expr::Value(_) | Expr::UnaryOp { .. } => constant(expr).map(|constant| constant.term),
                _ => None,
            },
            aggregate,
            formula,
            has_aggregate: inside.aggregate,
            has_window: inside.window,
            windows_stay: inside.window && !inside.subquery && self.windows_stay(expr),
            has_subquery: inside.subquery,
            byte_order,
            foreign_collation: explicit == Some(false),
        }
    }

    /// Has every window a key among what it is partitioned by?
    fn windows_stay(&self, expr: &Expr) -> bool {
        let mut windows = Windows { reader: self, stay: true };
        let _ = expr.visit(&mut windows);
        windows.stay
    }

    fn formula(&self, expr: &Expr) -> Option<Formula> {
        formula(expr, self.analyser.params, &|expr| match expr {
            Expr::Function(function) => self.aggregate(function).map(Formula::Aggregate),
            _ => self.column_of(expr).map(Formula::Column),
        })
    }

    /// Do all columns in it follow the database's byte order, so that the whole does?
    fn all_byte_order(&self, expr: &Expr) -> bool {
        let mut columns = ColumnOrders { reader: self, all: true };
        let _ = expr.visit(&mut columns);
        columns.all
    }

    fn aggregate(&self, function: &Function) -> Option<Aggregate> {
        if function.over.is_some() || !is_aggregate(function, self.analyser.schema.catalog) {
            return None;
        }
        let parts = name_parts(&function.name)?;
        let FunctionArguments::List(list) = &function.args else { return None };
        let only = match list.args.as_slice() {
            [FunctionArg::Unnamed(FunctionArgExpr::Expr(expr))] => Some(expr),
            _ => None,
        };
        let argument = only.and_then(|expr| self.column_of(expr));
        let order = only.map(|expr| self.expression(expr));
        Some(Aggregate {
            name: parts.last()?.as_str().into(),
            plain_name: parts.len() == 1,
            distinct: list.duplicate_treatment == Some(DuplicateTreatment::Distinct),
            argument_is_key: argument.as_ref().is_some_and(|column| column.is_key),
            argument_type: argument.map_or(0, |column| column.type_oid),
            argument_byte_order: order.is_some_and(|order| order.byte_order && !order.foreign_collation),
            ordered: !list.clauses.is_empty() || !function.within_group.is_empty() || list.args.len() != 1,
            filtered: function.filter.is_some(),
        })
    }
}

struct Windows<'r, 'b, 'a, 's> {
    reader: &'r Reader<'b, 'a, 's>,
    stay: bool,
}

impl Visitor for Windows<'_, '_, '_, '_> {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        let Expr::Function(function) = expr else { return ControlFlow::Continue(()) };
        if is_window(function, self.reader.analyser.schema.catalog) {
            let key = |expr: &Expr| self.reader.column_of(expr).is_some_and(|column| column.is_key);
            self.stay &= matches!(&function.over, Some(WindowType::WindowSpec(window))
                if window.window_name.is_none() && window.partition_by.iter().any(key));
        }
        ControlFlow::Continue(())
    }
}

struct ColumnOrders<'r, 'b, 'a, 's> {
    reader: &'r Reader<'b, 'a, 's>,
    all: bool,
}

impl Visitor for ColumnOrders<'_, '_, '_, '_> {
    type Break = ();

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        if matches!(expr, Expr::Identifier(_) | Expr::CompoundIdentifier(_)) {
            self.all &= self.reader.column_of(expr).is_some_and(|column| column.byte_order);
        }
        ControlFlow::Continue(())
    }
}

/// Collations whose order is that of the bytes (in UTF-8).
fn is_byte_collation(name: &sqlparser::ast::ObjectName) -> bool {
    let parts = name_parts(name).unwrap_or_default();
    matches!(parts.last().map(String::as_str), Some("C" | "POSIX" | "ucs_basic" | "pg_c_utf8"))
}
