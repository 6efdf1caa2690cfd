// node_modules/preact/dist/preact.mjs
var e, t, n, r, i, a, o, s, c, l, u = Symbol.for("pv"), d = {}, f = [], p = /^m(i|n|o|s|text|space)$/, m = Array.isArray, h = f.slice, g = Object.assign;
function _(e) {
	e && e.parentNode && e.remove();
}
function v(n, r, i, a, o) {
	var s = {
		type: n,
		props: r,
		key: i,
		ref: a,
		__k: null,
		__: null,
		__b: 0,
		__e: null,
		__c: null,
		constructor: u,
		__v: o || ++t,
		__i: -1,
		__u: 0
	};
	return !o && e.vnode && e.vnode(s), s;
}
function y(e) {
	return e.children;
}
function b(e, t) {
	this.props = e, this.context = t, this.__g = 0;
}
function x(e, t) {
	if (t == null) return e.__ && x(e.__, e.__i + 1);
	for (var n; t < e.__k.length; t++) if ((n = e.__k[t]) && n.__e) return n.__e;
	return typeof e.type != "function" || e.props.__P ? null : x(e);
}
function S(t) {
	var n, r = t.__v, i = r.__e, a = [], o = [], s = t.__P;
	s && ((n = g({ constructor: u }, r)).__v = r.__v + 1, e.vnode && e.vnode(n), ne(s, n, r, t.__n, s.namespaceURI, 32 & r.__u ? [i] : null, a, i || x(r), 32 & r.__u, o), n.__v = r.__v, n.__.__k[n.__i] = n, j(a, n, o), r.__ = r.__e = null, n.__e != i && C(n));
}
function C(e) {
	if ((e = e.__) && e.__c && !e.props.__P) return e.__e = null, e.__k.some(function(t) {
		return t && (e.__e = t.__e);
	}), C(e);
}
function w(t) {
	(8 & t.__g || (t.__g |= 8, n.push(t), i++)) && r == e.debounceRendering || ((r = e.debounceRendering) || queueMicrotask)(T);
}
function T() {
	try {
		for (var e, t = 1; n.length;) n.length > t && n.sort(a), e = n.shift(), t = n.length, 8 & e.__g && S(e);
	} finally {
		(i = n.length) && (r || queueMicrotask)(T);
	}
}
function E(e, t, n, r, i, a, o, s, c, l, u) {
	var p, m, h, g, _, v, y = r.__k || f, b = t.length;
	for (c = D(n, t, y, c, b), p = 0; p < b; p++) (h = n.__k[p]) != null && (m = ~h.__i && y[h.__i] || d, h.__i = p, v = ne(e, h, m, i, a, o, s, c, l, u), g = h.__e, (m.ref != h.ref || 8 & m.__u) && (m.ref && oe(m.ref, null, h, m), h.ref && u.push(h.ref, h.__c || g, h)), _ ||= g, 4 & h.__u ? (c = O(h, c, e, !m.__v), m.__e && (m.__e = null)) : typeof h.type == "function" && v !== void 0 ? c = v : g && (c = g.nextSibling), h.__u &= -21);
	return n.__e = _, c;
}
function D(e, t, n, r, i) {
	var a, o, s, c, l, d, f, p, h, g = n.length, _ = g, b = 0, S = 0, C = e.__k = Array(i);
	for (a = 0; a < i; a++) (o = t[a]) != null && typeof o != "boolean" && typeof o != "function" ? (typeof o != "object" || o.constructor === String ? o = C[a] = v(null, o) : m(o) ? o = C[a] = v(y, { children: o }) : o.constructor === u && o.__b ? o = C[a] = v(o.type, o.props, o.key, o.ref, o.__v) : C[a] = o, c = a + b, o.__ = e, o.__b = e.__b + 1, s = null, ~(l = o.__i = k(o, n, c, _)) && (_--, (s = n[l]) && (s.__u |= 2)), s && s.__v ? (o.__u |= 16, l == c - 1 ? b-- : l == c + 1 ? b++ : l != c && (l > c ? b-- : b++, S = 1)) : (~l || (i > g ? b-- : i < g && b++), typeof o.type != "function" && (o.__u |= 4))) : C[a] = null;
	if (S) {
		for (d = [], f = [], a = 0; a < i; a++) if ((o = C[a]) && 16 & o.__u) {
			for (b = 0, p = d.length; b < p;) d[h = b + p >> 1] < o.__i ? b = h + 1 : p = h;
			d[b] = o.__i, f[a] = b + 1;
		}
		for (b = d.length; a--;) f[a] && (f[a] == b ? b-- : C[a].__u |= 4);
	}
	if (_) for (a = 0; a < g; a++) !(s = n[a]) || 2 & s.__u || (s.__e == r && (r = x(s)), se(s, s));
	return r;
}
function O(e, t, n, r) {
	var i, a, o, s;
	if (typeof e.type == "function") {
		if (e.props.__P) return t;
		if (i = e.__k) for (a = 0; a < i.length; a++) i[a] && (i[a].__ = e, t = O(i[a], t, n, !1));
		return t;
	}
	for (t && !t.parentNode && (t = x(e)) && !t.parentNode && (t = null), o = e.__e, s = t; s && s.nodeType == 8;) s = s.nextSibling;
	for (o != s && (!r && n.moveBefore && o.parentNode ? n.moveBefore(o, t) : n.insertBefore(o, t || null)), t = o; (t &&= t.nextSibling) && t.nodeType == 8 && !t.data.startsWith("$s"););
	return t;
}
function k(e, t, n, r) {
	var i, a = e.key, o = e.type, s = t[n], c = s && !(2 & s.__u);
	if (s === null && a == null || c && a == s.key && o == s.type) return n;
	if (r > +!!c) {
		for (i = n - 1; i >= 0; i--) if ((s = t[i]) && !(2 & s.__u) && a == s.key && o == s.type) return i;
		for (i = n + 1; i < t.length; i++) if ((s = t[i]) && !(2 & s.__u) && a == s.key && o == s.type) return i;
	}
	return -1;
}
function A(e, t, n) {
	n ??= "", t[0] == "-" ? e.setProperty(t, n) : e[t] = n;
}
function ee(e, t, n, r, i) {
	var a, o;
	if (t == "style") {
		if (typeof n == "string") e.style.cssText = n;
		else {
			if (typeof r == "string" && (e.style.cssText = r = ""), r) for (t in r) n && t in n || A(e.style, t);
			if (n) for (t in n) r && n[t] == r[t] || A(e.style, t, n[t]);
		}
	} else if (t[0] == "o" && t[1] == "n") typeof n != "function" && (n = null), typeof r != "function" && (r = null), (e.__e ||= {})[t] = n, n && r || (o = l[t] || (l[t] = te(t)), (e.__a ||= {})[t] = c, a = t != (t = t.replace(s, "$1")), (t = t.slice(2))[0] < "a" && (t = t.toLowerCase()), n ? e.addEventListener(t, o, a) : e.removeEventListener(t, o, a));
	else {
		if (i == "http://www.w3.org/2000/svg") t = t.replace(/xlink(H|:h)/, "h").replace(/sName$/, "s");
		else if (t != "width" && t != "height" && t != "href" && t != "list" && t != "form" && t != "tabIndex" && t != "download" && t != "rowSpan" && t != "colSpan" && t != "role" && t != "popover" && t in e) try {
			e[t] = n ?? "";
			return;
		} catch {}
		if (typeof n == "function") return;
		n == null || !1 === n && t[4] != "-" ? e.removeAttribute(t) : e.setAttribute(t, t == "popover" && n == 1 ? "" : n);
	}
}
function te(t) {
	return function(n) {
		var r = this.__e;
		if (r) {
			if (r = r[t], n[o] == null) n[o] = c++;
			else if (n[o] < this.__a[t]) return;
			return r(e.event ? e.event(n) : n);
		}
	};
}
function ne(t, n, r, i, a, o, s, c, l, d) {
	var p, h, v, S, C, w, T, D, O, k, A, ee, te, ne, j, oe, M, N, P = n.type;
	if (n.constructor !== u) return null;
	128 & r.__u && (l = 32 & r.__u, p = r.__c.__z) && (n.__u |= l, h = o = [], p.nodeType == 8 ? c = re(p, o) : o.push(p), c = o[0] || c), (p = e.__b) && p(n);
	e: if (typeof P == "function") {
		v = s.length;
		try {
			if (D = n.props, O = (p = P.prototype) && p.render, k = (p = P.contextType) && i[p.__c], A = p ? k ? k.props.value : p.__ : i, (S = r.__c) ? (n.__c = S, 2 & S.__g && (S.__g |= 1)) : (O ? n.__c = S = new P(D, A) : (n.__c = S = new b(D, A), S.constructor = P, S.render = ce), k && k.sub(S), S.state || (S.state = {}), S.__n = i, S.__g |= 8, S.__h = [], S.__k = []), O && (S.__s || (S.__s = S.state), P.getDerivedStateFromProps && (S.__s == S.state && (S.__s = g({}, S.__s)), g(S.__s, P.getDerivedStateFromProps(D, S.__s)))), C = S.props, w = S.state, S.__v = n, r.__c) {
				if (D !== C && O && !P.getDerivedStateFromProps && S.componentWillReceiveProps && S.componentWillReceiveProps(D, A), n.__v == r.__v && !(8 & S.__g) || !(4 & S.__g) && S.shouldComponentUpdate && !1 === S.shouldComponentUpdate(D, S.__s, A)) {
					n.__v != r.__v && (S.props = D, S.state = S.__s, S.__g &= -9), n.__e = r.__e, n.__k = r.__k, n.__k.some(function(e) {
						e && (e.__ = n);
					}), f.push.apply(S.__h, S.__k), S.__k = [], S.__h.length && s.push(S), c = x(r);
					break e;
				}
				S.componentWillUpdate && S.componentWillUpdate(D, S.__s, A), O && S.componentDidUpdate && S.__h.push(function() {
					S.componentDidUpdate(C, w, T);
				});
			} else O && !P.getDerivedStateFromProps && S.componentWillMount && S.componentWillMount(), O && S.componentDidMount && S.__h.push(S.componentDidMount);
			S.context = A, S.props = D, S.__P = t, S.__g &= -5, ee = e.__r, te = O ? 25 : 0;
			do
				S.__g &= -9, ee && ee(n), p = S.render(S.props, S.state = S.__s, S.context);
			while (8 & S.__g && ++te < 25);
			O && (f.push.apply(S.__h, S.__k), S.__k = []), S.state = S.__s, S.getChildContext && (i = g({}, i, S.getChildContext())), O && r.__c && S.getSnapshotBeforeUpdate && (T = S.getSnapshotBeforeUpdate(C, w)), ne = p && p.type === y && p.key == null ? p.props.children : p, D.__P && (p = c, a = (t = D.__P).namespaceURI, l = o = null, r.props && r.props.__P != t && (r.__k.some(function(e) {
				e && se(e, e);
			}), r.__k = null), c = r.__k ? x(r, 0) : null), c = E(t, m(ne) ? ne : [ne], n, r, i, a, o, s, c, l, d), D.__P && (n.__e = null, c = p), n.__u &= -161, h && h.some(_), S.__h.length && s.push(S), 1 & S.__g && (S.__g &= -4);
		} catch (t) {
			if (s.length = v, n.__v = null, l || o) {
				if (t && t.then) {
					if (n.__u |= 128 | l, o) {
						for (~(M = o.indexOf(c || void 0)) || (M = o.length); (N = o[M - 1]) && N.nodeType == 8;) M--;
						for (; M < o.length; M++) if (N = o[M]) {
							if (o[M] = null, j) {
								if (N == oe) break;
							} else {
								if (N.nodeType != 8) break;
								N.data.startsWith("$s") && (oe = re(j = N));
							}
						}
					}
					if (!j) {
						for (; c && c.nodeType == 8 && c.nextSibling;) c = c.nextSibling;
						j = c;
					}
					(p = re(j = n.__c.__z || (n.__c.__z = j))) ? (n.__e = j, c = p) : n.__e = c, c &&= c.nextSibling;
				} else o && o.some(_);
			} else n.__e = r.__e;
			n.__k ||= r.__k || [], t && t.then || ie(n), e.__e(t, n, r);
		}
	} else c = n.__e = ae(r.__e, n, r, i, a, o, s, l, d, t);
	return (p = e.diffed) && p(n), c;
}
function re(e, t) {
	if (e && e.nodeType == 8 && e.data.startsWith("$s")) for (var n = 1; e = e.nextSibling;) {
		if (e.nodeType == 8) {
			if (e.data.startsWith("$s")) n++;
			else if (e.data.startsWith("/$s") && !--n) return e;
		}
		t && t.push(e);
	}
}
function ie(e) {
	e && (e.__c && (e.__c.__g |= 4), e.__k && e.__k.some(ie));
}
function j(t, n, r) {
	for (var i = 0; i < r.length;) oe(r[i++], r[i++], r[i++]);
	e.__c && e.__c(n, t), t.some(function(n) {
		try {
			t = n.__h, n.__h = [], t.some(function(e) {
				e.call(n);
			});
		} catch (t) {
			e.__e(t, n.__v);
		}
	});
}
function ae(t, n, r, i, a, o, s, c, l, u) {
	var f, g, v, y, b, S, C, w, T = r.props || d, D = n.props, O = n.type;
	if (O == "svg" ? a = "http://www.w3.org/2000/svg" : O == "math" ? a = "http://www.w3.org/1998/Math/MathML" : a ||= "http://www.w3.org/1999/xhtml", o) {
		for (f = 0; f < o.length; f++) if ((b = o[f]) && (O ? b.localName == O : b.nodeType == 3)) {
			t = b, o[f] = null;
			break;
		}
	}
	if (!t) {
		if (w = u.ownerDocument || document, !O) return w.createTextNode(D);
		t = w.createElementNS(a, O, D.is ? D : u), c &&= (e.__m && e.__m(n, o), !1), o = null;
	}
	if (O) {
		if (u = O == "template" && t.content || t, o = O == "textarea" && D.defaultValue != null ? null : o && h.call(u.childNodes), !c && o) for (T = {}, f = 0; f < t.attributes.length; f++) T[(b = t.attributes[f]).name] = b.value;
		for (f in T) b = T[f], f == "dangerouslySetInnerHTML" ? v = b : f == "children" || f in D || f == "value" && "defaultValue" in D || f == "checked" && "defaultChecked" in D || ee(t, f, null, b, a);
		for (f in D) b = D[f], f == "children" ? y = b : f == "dangerouslySetInnerHTML" ? g = b : f == "value" ? S = b : f == "checked" ? C = b : c && typeof b != "function" || T[f] === b || ee(t, f, b, T[f], a);
		g ? (c || v && (g.__html == v.__html || g.__html == t.innerHTML) || (t.innerHTML = g.__html), n.__k = []) : (v && (t.textContent = ""), (O == "foreignObject" || a == "http://www.w3.org/1998/Math/MathML" && p.test(O)) && (a = "http://www.w3.org/1999/xhtml"), E(u, m(y) ? y : [y], n, r, i, a, o, s, o ? o[0] : r.__k && x(r, 0), c, l), o && o.some(_)), c && O != "textarea" || (f = "value", O == "progress" && S == null ? t.removeAttribute(f) : S == null || S === t[f] && (O != "progress" || S) || ee(t, f, S, T[f], a), f = "checked", C != null && C != t[f] && ee(t, f, C, T[f], a));
	} else T === D || c && t.data == D || (t.data = D);
	return t;
}
function oe(t, n, r, i) {
	try {
		typeof t == "function" ? n ? n.__x = t(n) || 1 : (i &&= i.__c || i.__e) && (n = i.__x) && (i.__x = null, typeof n == "function" ? n() : t(null)) : t.current = n;
	} catch (t) {
		e.__e(t, r);
	}
}
function se(t, n, r) {
	var i, a, o, s;
	if (e.unmount && e.unmount(t), !(i = t.ref) || i.current && i.current != t.__e || oe(i, null, n, t), i = t.__c) {
		if (i.componentWillUnmount) try {
			i.componentWillUnmount();
		} catch (t) {
			e.__e(t, n);
		}
		i.__P = i.__n = null;
	}
	if (i = t.__k) for (s = 0; s < i.length; s++) i[s] && se(i[s], n, typeof t.type != "function" || r && !t.props.__P);
	!r && (i = t.__c) && (i = i.__z) && (a = re(i, o = [])) && (i == t.__e && o.some(_), _(a), _(i)), r || _(t.__e), t.__e = t.__c = t.__ = null;
}
function ce(e, t, n) {
	return this.constructor(e, n);
}
function M(t, n) {
	var r, i, a, o;
	e.__ && e.__(t, n), n.nodeType == 9 && (n = n.documentElement), i = (r = t && 32 & t.__u) ? null : n.__k, n.__k = v(y, { children: [t] }), a = [], o = [], ne(n, n.__k, i || d, d, n.namespaceURI, i ? null : n.firstChild ? h.call(n.childNodes) : null, a, i ? i.__e : n.firstChild, r, o), j(a, n.__k, o), n.__k.props.children = null;
}
e = { __e: function(e, t, n, r) {
	for (var a, o, s; t = t.__;) if ((a = t.__c) && !(1 & a.__g)) {
		a.__g |= 4;
		try {
			if ((s = (o = a.constructor) && o.getDerivedStateFromError) && a.setState(o.getDerivedStateFromError(e)), a.componentDidCatch && (a.componentDidCatch(e, r || {}), s = 1), s && 8 & a.__g) return void (a.__g |= 2);
		} catch (t) {
			e = t;
		}
	}
	throw i = 0, e;
} }, t = 0, b.prototype.setState = function(e, t) {
	var n = this.__s;
	n && n != this.state || (n = this.__s = g({}, this.state)), typeof e == "function" && (e = e(g({}, n), this.props)), e && (g(n, e), this.__v && (t && this.__k.push(t), w(this)));
}, b.prototype.forceUpdate = function(e) {
	this.__v && (this.__g |= 4, e && this.__h.push(e), w(this));
}, b.prototype.render = y, n = [], i = 0, a = function(e, t) {
	return e.__v.__b - t.__v.__b;
}, o = Symbol(), s = /(PointerCapture)$|Capture$/i, c = 0, l = {};
// node_modules/preact/hooks/dist/hooks.mjs
var N, P, le, ue, de = Object.is, fe = 0, pe = [], me = [], F = e, he = F.__b, ge = F.__r, _e = F.diffed, ve = F.__c, ye = F.unmount, be = F.__;
function xe(e, t) {
	F.__h && F.__h(P, e, fe || t), fe = 0;
	var n = P.__H || (P.__H = {
		__: [],
		__h: []
	});
	return e >= n.__.length && n.__.push({}), n.__[e];
}
function I(e) {
	return fe = 1, Se(je, e);
}
function Se(e, t, n) {
	var r = xe(N++, 2);
	if (r.t = e, !r.__c && (r.__ = [n ? n(t) : je(void 0, t), function(e) {
		var t = (r.__N || r.__)[0], n = r.t(t, e);
		de(t, n) || (r.__N = [n, r.__[1]], r.__c.setState({}));
	}], r.__c = P, !P.__f)) {
		P.__f = !0;
		var i = P.shouldComponentUpdate;
		P.shouldComponentUpdate = function(e, t, n) {
			var r = this.__H;
			if (!r) return !0;
			var a = !1, o = this.props != e;
			if (r.__.some(function(e) {
				e.__N && (a = !0, de(e.__[0], e.__N[0]) || (o = !0));
			}), i) {
				var s = i.call(this, e, t, n);
				return a ? s || o : s;
			}
			return !a || o;
		};
	}
	return r.__;
}
function L(e, t) {
	var n = xe(N++, 3);
	!F.__s && Ae(n.__H, t) && (n.__P = !0, n.__ = e, n.u = t, P.__H.__h.push(n));
}
function Ce(e, t) {
	var n = xe(N++, 4);
	!F.__s && Ae(n.__H, t) && (n.__P = !1, n.__ = e, n.u = t, P.__h.push(n));
}
function R(e) {
	return fe = 5, z(function() {
		return { current: e };
	}, []);
}
function z(e, t) {
	var n = xe(N++, 7);
	return Ae(n.__H, t) && (n.__ = e(), n.__H = t), n.__;
}
function we() {
	var e;
	do {
		for (; e = me.shift();) try {
			Oe(e);
		} catch (t) {
			F.__e(t, { __: (e = e.__P) && e.__v });
		}
		for (; e = pe.shift();) {
			var t = e.__H;
			if (e.__P && t) try {
				t.__h.some(Oe), t.__h.some(ke), t.__h = [];
			} catch (n) {
				t.__h = [], F.__e(n, e.__v);
			}
		}
	} while (me.length);
}
F.__b = function(e) {
	P = null, he && he(e);
}, F.__ = function(e, t) {
	e && t.__k && t.__k.__m && (e.__m = t.__k.__m), be && be(e, t);
}, F.__r = function(e) {
	ge && ge(e), N = 0;
	var t = (P = e.__c).__H;
	t && (le == P ? P.__h = [] : (t.__h.some(Oe), t.__h.some(ke), N = 0), t.__h = [], t.__.some(function(e) {
		e.__N && (e.__ = e.__N), e.u = e.__N = void 0;
	})), le = P;
}, F.diffed = function(e) {
	_e && _e(e);
	var t = e.__c;
	t && t.__H && (t.__H.__h.length && De(pe.push(t)), t.__H.__.some(function(e) {
		e.u && (e.__H = e.u);
	})), le = P = null;
}, F.__c = function(e, t) {
	t.some(function(e) {
		try {
			e.__h.some(Oe), e.__h = e.__h.filter(function(e) {
				return !e.__ || ke(e);
			});
		} catch (t) {
			e.__h = [function() {
				throw t;
			}];
		}
	}), ve && ve(e, t);
}, F.unmount = function(e) {
	ye && ye(e);
	var t, n, r = e.__c;
	r && r.__H && (r.__H.__.some(function(r) {
		try {
			if (r.__P && r.__c) {
				if (n === void 0) {
					for (n = e.__; n && (!n.__c || !n.__c.__P);) n = n.__;
					n &&= n.__c;
				}
				r.__P = n, De(me.push(r));
			} else Oe(r);
		} catch (e) {
			t = e;
		}
	}), r.__H = void 0, t && F.__e(t, r.__v));
};
var Te = typeof requestAnimationFrame == "function";
function Ee(e) {
	var t, n = function() {
		clearTimeout(r), Te && cancelAnimationFrame(t), setTimeout(e);
	}, r = setTimeout(n, 35);
	Te && (t = requestAnimationFrame(n));
}
function De(e) {
	e != 1 && ue == F.requestAnimationFrame || ((ue = F.requestAnimationFrame) || Ee)(we);
}
function Oe(e) {
	var t = P, n = e.__c;
	typeof n == "function" && (e.__c = void 0, n()), P = t;
}
function ke(e) {
	var t = P;
	e.__c = e.__(), P = t;
}
function Ae(e, t) {
	return !e || e.length != t.length || t.some(function(t, n) {
		return !de(t, e[n]);
	});
}
function je(e, t) {
	return typeof t == "function" ? t(e) : t;
}
// src/data.ts
var Me = /* @__PURE__ */ new WeakMap();
function B(e) {
	let t = Me.get(e);
	if (t || e.data === null) return t ?? null;
	let n = Ne(Uint8Array.from(atob(e.data), (e) => e.charCodeAt(0)).buffer, e.type);
	return Me.set(e, n), n;
}
function Ne(e, t) {
	return t === "float32" ? new Float32Array(e) : new Float64Array(e);
}
function V(e, t) {
	return e.variables.find((e) => e.name === t);
}
function Pe(e, t) {
	let n = V(e, e.main), r = V(e, t);
	return !n || !r || r.unit !== n.unit || r.axes.join() !== n.axes.join() ? null : B(r);
}
function H(e) {
	if (typeof e != "number") return e == null ? "–" : String(e);
	if (!Number.isFinite(e)) return Number.isNaN(e) ? "–" : e > 0 ? "∞" : "−∞";
	if (Number.isInteger(e) && Math.abs(e) < 1e7) return Le(String(e));
	let t = Math.abs(e);
	if (t < .001 || t >= 1e5) return Le(e.toExponential(2).replace("e+", "e"));
	let n = Math.max(0, 3 - (t >= 1 ? Math.floor(Math.log10(t)) : 0));
	return Le(e.toFixed(n));
}
function Fe(e) {
	if (!Number.isFinite(e)) return "";
	let t = Math.abs(e);
	return Le(t && (t < .01 || t >= 1e4) ? e.toExponential(0).replace("e+", "e") : e.toFixed(t >= 100 ? 0 : t >= 10 ? 1 : 2));
}
function Ie(e) {
	let t = e.length > 1 ? Math.abs(e[1] - e[0]) : Math.abs(e[0] ?? 1) || 1;
	if (t < 1e-4 || t >= 1e5) return e.map((e) => e ? Le(e.toExponential(1).replace("e+", "e")) : "0");
	let n = Math.max(0, -Math.floor(Math.log10(t) + 1e-9));
	return e.map((e) => Le(e.toFixed(n)));
}
function Le(e) {
	return e.replace(/^-/, Number(e) === 0 ? "" : "−").replace("e-", "e−");
}
function U(e) {
	return e.replace(/^stories\./, "").replace(/(?<![a-z])n_parts/, "number of parts").replace(/_/g, " ");
}
var Re = {
	acdc: "ACDC",
	atp_star: "AtP*",
	das: "DAS",
	dexperts: "DExperts",
	dola: "DoLa",
	knn: "kNN-LM",
	knn_parts: "kNN-LM by parts",
	longheads: "LongHeads"
};
function W(e) {
	let t = e.slice(e.lastIndexOf(".") + 1), n = U(t);
	return Re[t] ?? n.charAt(0).toUpperCase() + n.slice(1);
}
function G(e) {
	let t = e.replace(/\n/g, "\\n").replace(/\t/g, "\\t");
	return t === t.trim() ? t : t.replace(/ /g, "␣");
}
function ze(e) {
	return e == null ? "" : Array.isArray(e) ? e.map(ze).join(", ") : typeof e == "object" ? JSON.stringify(e) : typeof e == "number" ? H(e) : typeof e == "boolean" ? e ? "yes" : "no" : e;
}
function Be(e, t) {
	return t.reduce((t, n, r) => t * (e[r] ?? 1) + n, 0);
}
// src/api.ts
var Ve = class extends Error {};
async function He(e) {
	if (e.ok) return e;
	let t = `${e.status} ${e.statusText}`;
	try {
		t = String((await e.json()).error.message);
	} catch {}
	throw new Ve(t);
}
async function Ue(e, t) {
	let n;
	try {
		n = await fetch(e, {
			credentials: "same-origin",
			...t
		});
	} catch (e) {
		throw e.name === "AbortError" ? e : new Ve("The server does not answer. Is it still running?");
	}
	return He(n);
}
async function We(e, t) {
	return (await Ue(e, t ? { signal: t } : {})).json();
}
async function Ge(e, t, n) {
	let r = {
		method: "POST",
		headers: { "content-type": "application/json" },
		body: JSON.stringify(t)
	};
	return (await Ue(e, n ? {
		...r,
		signal: n
	} : r)).json();
}
async function Ke(e, t, n) {
	let r = await Ue("/api/look", {
		method: "POST",
		headers: { "content-type": "application/json" },
		body: JSON.stringify(e),
		signal: n
	});
	if (!r.headers.get("content-type")?.includes("ndjson") || !r.body) return await r.json();
	let i = r.body.pipeThrough(new TextDecoderStream()).getReader(), a = "";
	for (;;) {
		let { done: e, value: n } = await i.read(), r = (a + (n ?? "")).split("\n");
		a = r.pop() ?? "";
		for (let e of r) {
			let n = JSON.parse(e);
			if (n.error) throw new Ve(n.error.message);
			if (n.answer !== void 0) return n.answer;
			n.piece !== void 0 && t(n.piece);
		}
		if (e) throw new Ve("The server stopped before it had answered.");
	}
}
function K(e, t) {
	let n = e ? JSON.stringify(e) : "", [r, i] = I({
		key: "",
		got: null,
		failed: ""
	});
	return L(() => {
		if (!e) return;
		let r = new AbortController();
		return Ke(e, (e) => !r.signal.aborted && t?.(e), r.signal).then((e) => i({
			key: n,
			got: e,
			failed: ""
		}), (e) => !r.signal.aborted && i({
			key: n,
			got: null,
			failed: e.message
		})), () => r.abort();
	}, [n]), r.key === n ? {
		...r,
		busy: !1
	} : {
		got: null,
		failed: "",
		busy: !!e
	};
}
function qe(e) {
	return e.split("/").map(encodeURIComponent).join("/");
}
function Je(e) {
	return async (t, n) => Ne(await (await Ue(`/api/slice?${new URLSearchParams({
		name: e,
		variable: t.name,
		fixed: n.join(",")
	})}`)).arrayBuffer(), t.type);
}
function q(e, t = 0) {
	let [n, r] = I({
		path: null,
		got: null,
		failed: "",
		busy: !0
	});
	return L(() => {
		if (e === null) return;
		let t = new AbortController();
		return r((t) => ({
			path: e,
			got: t.path === e ? t.got : null,
			failed: "",
			busy: !0
		})), We(e, t.signal).then((t) => r({
			path: e,
			got: t,
			failed: "",
			busy: !1
		}), (t) => t.name !== "AbortError" && r({
			path: e,
			got: null,
			failed: t.message,
			busy: !1
		})), () => t.abort();
	}, [e, t]), n.path === e ? n : {
		got: null,
		failed: "",
		busy: !0
	};
}
function Ye() {
	let [e, t] = I(null), [n, r] = I(!1);
	return L(() => {
		let e = null, n = 0, i = () => {
			e = new EventSource("/api/events"), e.onmessage = (e) => {
				r(!1), t(JSON.parse(e.data));
			}, e.onerror = () => {
				r(!0), e?.readyState === EventSource.CLOSED && (n = window.setTimeout(i, 2e3));
			};
		};
		return i(), () => {
			clearTimeout(n), e?.close();
		};
	}, []), {
		state: e,
		lost: n
	};
}
// node_modules/preact/jsx-runtime/dist/jsxRuntime.mjs
var Xe = Symbol.for("pv"), Ze = 0;
Array.isArray;
function J(t, n, r, i, a, o) {
	n ||= {};
	var s, c, l = n;
	if ("ref" in l && typeof t != "function") for (c in l = {}, n) c == "ref" ? s = n[c] : l[c] = n[c];
	var u = {
		type: t,
		props: l,
		key: r,
		ref: s,
		__k: null,
		__: null,
		__b: 0,
		__e: null,
		__c: null,
		constructor: Xe,
		__v: --Ze,
		__i: -1,
		__u: 0
	};
	return (a || o) && (u.__source = a, u.__self = o), e.vnode && e.vnode(u), u;
}
// src/parts.tsx
function Qe(e, t = 640) {
	let [n, r] = I(t);
	return Ce(() => {
		let t = e.current;
		if (!t) return;
		let n = () => r(Math.max(120, Math.floor(t.clientWidth)));
		n();
		let i = new ResizeObserver(n);
		return i.observe(t), () => i.disconnect();
	}, []), n;
}
function $e() {
	let [e, t] = I(et());
	return L(() => {
		let e = () => t(et()), n = matchMedia("(prefers-color-scheme: dark)");
		n.addEventListener("change", e);
		let r = new MutationObserver(e);
		for (let e of [document.documentElement, document.body]) r.observe(e, {
			attributes: !0,
			attributeFilter: [
				"data-theme",
				"data-jp-theme-light",
				"class"
			]
		});
		return () => {
			n.removeEventListener("change", e), r.disconnect();
		};
	}, []), e;
}
function et() {
	let e = document.documentElement.dataset.theme;
	if (e === "dark" || e === "light") return e === "dark";
	let t = document.body?.dataset.jpThemeLight;
	return t ? t === "false" : document.body?.classList.contains("vscode-dark") ? !0 : !document.body?.classList.contains("vscode-light") && matchMedia("(prefers-color-scheme: dark)").matches;
}
function tt({ text: e, label: t = "Copy" }) {
	let [n, r] = I("");
	return /* @__PURE__ */ J("button", {
		type: "button",
		class: "quiet",
		onClick: async () => {
			try {
				await navigator.clipboard.writeText(e()), r("Copied");
			} catch {
				r("Not allowed here");
			}
			setTimeout(() => r(""), 1500);
		},
		"aria-live": "polite",
		children: n || t
	});
}
function nt({ text: e }) {
	return /* @__PURE__ */ J(y, { children: e.split(/`([^`]+)`/).map((e, t) => t % 2 ? /* @__PURE__ */ J("code", { children: e }) : e) });
}
function Y(e) {
	return /* @__PURE__ */ J("section", {
		class: `panel ${e.class ?? ""}`,
		id: e.id,
		children: [(e.title || e.aside) && /* @__PURE__ */ J("div", {
			class: "panel-head",
			children: [e.title && /* @__PURE__ */ J("h2", { children: e.title }), e.aside && /* @__PURE__ */ J("div", {
				class: "panel-aside",
				children: e.aside
			})]
		}), e.children]
	});
}
function X({ title: e, children: t }) {
	return /* @__PURE__ */ J("div", {
		class: "empty",
		children: [
			/* @__PURE__ */ J("svg", {
				viewBox: "0 0 96 40",
				"aria-hidden": "true",
				children: [
					/* @__PURE__ */ J("circle", {
						cx: "16",
						cy: "20",
						r: "9"
					}),
					/* @__PURE__ */ J("circle", {
						cx: "80",
						cy: "20",
						r: "9"
					}),
					/* @__PURE__ */ J("circle", {
						cx: "16",
						cy: "20",
						r: "3",
						class: "hole"
					}),
					/* @__PURE__ */ J("circle", {
						cx: "80",
						cy: "20",
						r: "3",
						class: "hole"
					}),
					/* @__PURE__ */ J("path", { d: "M16 20 C 34 44, 48 40, 54 30" })
				]
			}),
			/* @__PURE__ */ J("p", {
				class: "empty-title",
				children: e
			}),
			t
		]
	});
}
function Z({ message: e, children: t }) {
	return /* @__PURE__ */ J("div", {
		class: "failed",
		role: "alert",
		children: [/* @__PURE__ */ J("p", { children: e }), t]
	});
}
// src/colour.ts
var rt = {
	below: [
		[
			250,
			222,
			196
		],
		[
			236,
			154,
			92
		],
		[
			190,
			82,
			12
		],
		[
			122,
			46,
			0
		]
	],
	zero: [
		250,
		250,
		248
	],
	above: [
		[
			205,
			227,
			243
		],
		[
			112,
			174,
			219
		],
		[
			22,
			108,
			170
		],
		[
			4,
			58,
			104
		]
	],
	none: [
		217,
		222,
		228
	]
}, it = {
	below: [
		[
			74,
			44,
			24
		],
		[
			150,
			80,
			30
		],
		[
			226,
			132,
			62
		],
		[
			255,
			205,
			160
		]
	],
	zero: [
		30,
		37,
		45
	],
	above: [
		[
			26,
			58,
			82
		],
		[
			34,
			104,
			152
		],
		[
			80,
			168,
			226
		],
		[
			190,
			228,
			255
		]
	],
	none: [
		58,
		66,
		74
	]
};
function at(e, t, n) {
	let r = n ? it : rt, i = e < 0, a = Math.max(-e, t) || 1, o = i ? -a : e >= 0 && e < t / 2 ? 0 : e, s = i ? a : t > o ? t : o + 1;
	return {
		low: o,
		high: s,
		signed: i,
		at: (e) => {
			if (!Number.isFinite(e)) return r.none;
			let t = i ? e / a : (e - o) / (s - o);
			return ot([r.zero, ...t < 0 ? r.below : r.above], Math.min(1, Math.abs(t)));
		}
	};
}
function ot(e, t) {
	let n = t * (e.length - 1), r = Math.min(e.length - 2, Math.floor(n)), i = e[r], a = e[r + 1];
	return [
		0,
		1,
		2
	].map((e) => Math.round(i[e] + (n - r) * (a[e] - i[e])));
}
function st(e) {
	return `rgb(${e.join(" ")})`;
}
function ct(e) {
	let [t, n, r] = e.map((e) => {
		let t = e / 255;
		return t <= .04045 ? t / 12.92 : ((t + .055) / 1.055) ** 2.4;
	});
	return .2126 * t + .7152 * n + .0722 * r > .179 ? "#000000" : "#ffffff";
}
function lt(e) {
	let t = /* @__PURE__ */ new Uint32Array(513), n = ([e, t, n]) => (255 << 24 | n << 16 | t << 8 | e) >>> 0;
	for (let r = 0; r < 512; r++) t[r] = n(e.at(e.low + (e.high - e.low) * r / 511));
	t[512] = n(e.at(NaN));
	let r = 511 / (e.high - e.low);
	return {
		of: (t) => Number.isNaN(t) ? 512 : Math.max(0, Math.min(511, Math.round((t - e.low) * r))),
		none: 512,
		colours: t
	};
}
function ut(e, t, n = 5) {
	if (!(t > e)) return [e];
	let r = (t - e) / n, i = 10 ** Math.floor(Math.log10(r)), a = i * ([
		1,
		2,
		5,
		10
	].find((e) => e * 1.3 >= r / i) ?? 10), o = [];
	for (let n = Math.ceil(e / a - 1e-9); n * a <= t + a * 1e-9; n++) o.push(n * a);
	return o;
}
// src/bars.tsx
function dt({ bars: e, unit: t, label: n }) {
	let r = e.flatMap((e) => [
		e.value,
		e.low,
		e.high,
		e.nullHigh,
		e.nullLow,
		e.nullMean,
		...e.draws ?? [],
		0
	]).filter((e) => typeof e == "number" && Number.isFinite(e)), [i, a] = [Math.min(...r, 0), Math.max(...r, 0)];
	i === a && (a = 1);
	let o = (a - i) * .03;
	i -= i < 0 ? o : 0, a += a > 0 ? o : 0;
	let s = (e) => 100 * (e - i) / (a - i), c = ut(i, a, 5), l = Ie(c), u = e.some((e) => Q(e.nullMean)), d = e.some((e) => e.draws?.length), f = e.some((e) => Q(e.low));
	return /* @__PURE__ */ J("figure", {
		class: "bars",
		children: [
			(u || f || d) && /* @__PURE__ */ J("p", {
				class: "key",
				children: [
					f && /* @__PURE__ */ J("span", { children: [/* @__PURE__ */ J("i", { class: "key-whisker" }), " 95 % interval"] }),
					u && /* @__PURE__ */ J("span", { children: [/* @__PURE__ */ J("i", { class: "key-null" }), " random control"] }),
					d && /* @__PURE__ */ J("span", { children: [/* @__PURE__ */ J("i", { class: "key-draw" }), " random draws"] })
				]
			}),
			/* @__PURE__ */ J("ol", {
				"aria-label": n,
				children: e.map((e) => /* @__PURE__ */ J("li", {
					class: e.strong ? "strong" : "",
					title: `${e.name}: ${H(e.value)} ${t}${e.aside ? `, ${e.aside}` : ""}`,
					children: [
						/* @__PURE__ */ J("span", {
							class: "bar-name",
							children: e.link ? /* @__PURE__ */ J("a", {
								href: e.link,
								children: G(e.name)
							}) : G(e.name)
						}),
						/* @__PURE__ */ J("span", {
							class: "bar-track",
							"aria-hidden": "true",
							children: [
								c.map((e) => /* @__PURE__ */ J("i", {
									class: e === 0 ? "grid zero" : "grid",
									style: { left: `${s(e)}%` }
								})),
								Q(e.nullLow) && Q(e.nullHigh) && /* @__PURE__ */ J("i", {
									class: "null",
									style: ft(s(e.nullLow), s(e.nullHigh))
								}),
								/* @__PURE__ */ J("i", {
									class: e.value < 0 ? "bar below" : "bar",
									style: ft(s(0), s(e.value))
								}),
								Q(e.nullMean) && /* @__PURE__ */ J("i", {
									class: "null-mean",
									style: { left: `${s(e.nullMean)}%` }
								}),
								e.draws?.filter(Q).map((e) => /* @__PURE__ */ J("i", {
									class: "draw",
									style: { left: `${s(e)}%` }
								})),
								Q(e.low) && Q(e.high) && /* @__PURE__ */ J("i", {
									class: "whisker",
									style: ft(s(e.low), s(e.high))
								})
							]
						}),
						/* @__PURE__ */ J("span", {
							class: "bar-value num",
							children: H(e.value)
						})
					]
				}))
			}),
			/* @__PURE__ */ J("div", {
				class: c.length > 4 ? "bar-axis many" : "bar-axis",
				"aria-hidden": "true",
				children: [
					/* @__PURE__ */ J("span", { class: "bar-name" }),
					/* @__PURE__ */ J("span", {
						class: "bar-track",
						children: c.map((e, t) => /* @__PURE__ */ J("span", {
							class: "num",
							style: { left: `${s(e)}%` },
							children: l[t]
						}))
					}),
					/* @__PURE__ */ J("span", {
						class: "bar-value",
						children: t
					})
				]
			})
		]
	});
}
function Q(e) {
	return typeof e == "number" && Number.isFinite(e);
}
function ft(e, t) {
	return {
		left: `${Math.min(e, t)}%`,
		width: `${Math.abs(t - e)}%`
	};
}
// src/curve.tsx
function pt({ x: e, names: t, lines: n, axis: r, unit: i, label: a }) {
	let o = R(null), s = Qe(o), [c, l] = I(null), [u, d, f, p] = [
		56,
		14,
		10,
		40
	], m = Math.round(Math.min(300, Math.max(190, s * .46))), h = n.flatMap((e) => [
		...mt(e.y),
		...mt(e.low),
		...mt(e.high)
	]), [g, _] = [Math.min(...h, 0), Math.max(...h, 0)];
	g === _ && (_ = g + 1);
	let v = (_ - g) * .06;
	[g, _] = [g < 0 ? g - v : g, _ + v];
	let [b, x] = [Math.min(...e), Math.max(...e)], S = (e) => u + (s - u - d) * (e - b) / (x - b || 1), C = (e) => f + (m - f - p) * (_ - e) / (_ - g), w = ut(g, _, 5), T = Ie(w), E = t || e.length <= 9 ? e : ut(b, x, 7), D = (t) => {
		let n = o.current?.querySelector("svg")?.getBoundingClientRect();
		if (!n) return null;
		let r = e.map((e) => Math.abs(S(e) - (t - n.left)));
		return r.indexOf(Math.min(...r));
	};
	return /* @__PURE__ */ J("figure", {
		class: "curve",
		ref: o,
		children: [
			/* @__PURE__ */ J("output", {
				class: "readout",
				"aria-live": "polite",
				children: c === null ? /* @__PURE__ */ J("span", {
					class: "hint",
					children: [r, ": point at a step, or move with the arrow keys"]
				}) : /* @__PURE__ */ J(y, { children: [/* @__PURE__ */ J("span", {
					class: "where",
					children: [
						r,
						" ",
						t?.[c] ?? H(e[c])
					]
				}), n.map((e, t) => Number.isFinite(e.y[c]) && /* @__PURE__ */ J("span", {
					class: `told series-${e.control ? "control" : t % 6}`,
					children: [
						/* @__PURE__ */ J("i", {}),
						" ",
						e.name,
						" ",
						/* @__PURE__ */ J("b", {
							class: "num",
							children: H(e.y[c])
						}),
						e.low && e.high && Number.isFinite(e.low[c]) && /* @__PURE__ */ J("span", {
							class: "num",
							children: [
								" (",
								H(e.low[c]),
								" to ",
								H(e.high[c]),
								")"
							]
						})
					]
				}))] })
			}),
			/* @__PURE__ */ J("svg", {
				viewBox: `0 0 ${s} ${m}`,
				width: s,
				height: m,
				tabIndex: 0,
				role: "application",
				"aria-roledescription": "curve",
				"aria-label": `${a}, over ${r}. Arrow keys move from step to step.`,
				onKeyDown: (t) => {
					let n = t.key === "ArrowRight" ? 1 : t.key === "ArrowLeft" ? -1 : 0;
					n && (t.preventDefault(), l(Math.max(0, Math.min(e.length - 1, (c ?? (n > 0 ? -1 : e.length)) + n))));
				},
				onPointerMove: (e) => l(D(e.clientX)),
				onPointerLeave: () => l(null),
				children: [
					w.map((e, t) => /* @__PURE__ */ J("g", { children: [/* @__PURE__ */ J("line", {
						class: e === 0 ? "zero" : "grid",
						x1: u,
						x2: s - d,
						y1: C(e),
						y2: C(e)
					}), /* @__PURE__ */ J("text", {
						class: "num",
						x: u - 8,
						y: C(e),
						"text-anchor": "end",
						"dominant-baseline": "middle",
						children: T[t]
					})] })),
					E.map((e, n) => /* @__PURE__ */ J("text", {
						class: "num",
						x: S(e),
						y: m - p + 16,
						"text-anchor": "middle",
						children: t ? t.length > 14 && n % Math.ceil(t.length / 14) ? "" : t[n] : `${+e.toPrecision(6)}`
					})),
					/* @__PURE__ */ J("text", {
						class: "axis",
						x: (u + s - d) / 2,
						y: m - 4,
						"text-anchor": "middle",
						children: r
					}),
					n.map((t, n) => /* @__PURE__ */ J("g", {
						class: `series-${t.control ? "control" : n % 6}`,
						children: [
							t.low && t.high && /* @__PURE__ */ J("path", {
								class: "band",
								d: gt(e, t.low, t.high, S, C)
							}),
							/* @__PURE__ */ J("path", {
								class: "line",
								d: ht(e, t.y, S, C)
							}),
							e.length <= 40 && e.map((e, n) => Number.isFinite(t.y[n]) && /* @__PURE__ */ J("circle", {
								cx: S(e),
								cy: C(t.y[n]),
								r: c === n ? 5 : 3
							}))
						]
					})),
					c !== null && /* @__PURE__ */ J("line", {
						class: "at",
						x1: S(e[c]),
						x2: S(e[c]),
						y1: f,
						y2: m - p
					})
				]
			}),
			/* @__PURE__ */ J("p", {
				class: "key",
				children: [n.map((e, t) => /* @__PURE__ */ J("span", {
					class: `series-${e.control ? "control" : t % 6}`,
					children: [
						/* @__PURE__ */ J("i", {}),
						" ",
						e.name
					]
				})), i && /* @__PURE__ */ J("span", {
					class: "legend-unit",
					children: ["in ", i]
				})]
			})
		]
	});
}
function mt(e) {
	return e ? Array.from(e).filter(Number.isFinite) : [];
}
function ht(e, t, n, r) {
	let i = "M", a = "";
	return e.forEach((e, o) => {
		Number.isFinite(t[o]) ? (a += `${i}${n(e).toFixed(1)} ${r(t[o]).toFixed(1)}`, i = "L") : i = "M";
	}), a;
}
function gt(e, t, n, r, i) {
	let a = e.map((e, t) => t).filter((e) => Number.isFinite(t[e]) && Number.isFinite(n[e]));
	if (a.length < 2) return "";
	let o = (t, n) => `${r(e[t]).toFixed(1)} ${i(n[t]).toFixed(1)}`;
	return `M${a.map((e) => o(e, n)).join("L")}L${a.reverse().map((e) => o(e, t)).join("L")}Z`;
}
// src/heat.tsx
var _t = "12px ui-sans-serif, system-ui, -apple-system, \"Segoe UI\", Roboto, sans-serif", vt = _t.replace("12px", "11px"), yt = 620;
function bt(e) {
	let t = R(null), n = R(null), r = R(null), i = Qe(t), a = $e(), [o, s] = I(1), [c, l] = I(null), u = e.columns.length, d = z(() => {
		let [t, n] = e.range ?? Dt(e.values);
		return at(t, n, a);
	}, [
		e.values,
		a,
		e.range?.[0],
		e.range?.[1]
	]), f = z(() => ({
		rows: e.rows.map(G),
		columns: e.columns.map(G)
	}), [e.rows, e.columns]), p = z(() => Et(e, f, i, o), [
		e,
		f,
		i,
		o
	]), m = z(() => new Ot(e.values, e.rows.length, u, d), [e.values, d]), h = () => {
		let t = r.current, i = n.current;
		t && i && kt(t, i, e, f, p, d, m);
	};
	Ce(h), L(() => {
		let e = n.current, t = 0, r = () => {
			cancelAnimationFrame(t), t = requestAnimationFrame(h);
		};
		return e?.addEventListener("scroll", r, { passive: !0 }), () => e?.removeEventListener("scroll", r);
	});
	let g = (t) => e.upward ? e.rows.length - 1 - t : t, _ = (t) => {
		let i = r.current?.getBoundingClientRect(), a = n.current;
		if (!i || !a) return null;
		let o = t.clientX - i.left - p.left + a.scrollLeft, s = t.clientY - i.top + a.scrollTop, c = Math.floor(o / p.cell[0]), l = Math.floor(s / p.cell[1]);
		return t.clientX - i.left < p.left || c < 0 || c >= u || l < 0 || l >= e.rows.length || t.clientY - i.top > p.window[1] - p.bottom ? null : g(l) * u + c;
	}, v = (e) => {
		l(e);
		let t = n.current;
		if (!t) return;
		let r = e % u * p.cell[0], i = g(Math.floor(e / u)) * p.cell[1], [a, o] = [p.window[0] - p.left, p.window[1] - p.bottom];
		t.scrollTo(Math.min(Math.max(t.scrollLeft, r + p.cell[0] - a), r), Math.min(Math.max(t.scrollTop, i + p.cell[1] - o), i));
	}, y = (t) => {
		let n = e.upward ? -u : u, r = c ?? e.picked ?? (e.upward ? (e.rows.length - 1) * u : 0), i = {
			ArrowRight: r % u < u - 1 ? r + 1 : r,
			ArrowLeft: r % u > 0 ? r - 1 : r,
			ArrowDown: r + n,
			ArrowUp: r - n,
			Home: r - r % u,
			End: r - r % u + u - 1
		}[t.key];
		i === void 0 ? (t.key === "Enter" || t.key === " ") && c !== null && e.onPick ? (t.preventDefault(), e.onPick(Math.floor(c / u), c % u)) : t.key === "+" || t.key === "=" ? s(Math.min(64, o * 2)) : t.key === "-" ? s(Math.max(1, o / 2)) : t.key === "Escape" && l(null) : (t.preventDefault(), v(i >= 0 && i < e.values.length ? i : r));
	}, b = c ?? e.picked ?? null, x = p.cell[0] < 26 || p.cell[1] < 14 || o > 1;
	return /* @__PURE__ */ J("figure", {
		class: "heat",
		ref: t,
		children: [
			/* @__PURE__ */ J("div", {
				class: "heat-bar",
				children: [/* @__PURE__ */ J("output", {
					class: "readout",
					"aria-live": "polite",
					children: b === null ? /* @__PURE__ */ J("span", {
						class: "hint",
						children: St(e)
					}) : /* @__PURE__ */ J(xt, {
						...e,
						place: b,
						labels: f
					})
				}), x && /* @__PURE__ */ J("span", {
					class: "zoom",
					role: "group",
					"aria-label": "Zoom",
					children: [
						/* @__PURE__ */ J("button", {
							type: "button",
							class: "quiet",
							disabled: o <= 1,
							onClick: () => s(o / 2),
							"aria-label": "Zoom out",
							children: "−"
						}),
						/* @__PURE__ */ J("button", {
							type: "button",
							class: "quiet",
							disabled: o === 1,
							onClick: () => s(1),
							children: "Fit"
						}),
						/* @__PURE__ */ J("button", {
							type: "button",
							class: "quiet",
							disabled: o >= 64,
							onClick: () => s(o * 2),
							"aria-label": "Zoom in",
							children: "+"
						})
					]
				})]
			}),
			/* @__PURE__ */ J("div", {
				class: "heat-scroll",
				ref: n,
				tabIndex: 0,
				role: "application",
				"aria-roledescription": "map of cells",
				"aria-label": `${e.label}: ${e.rows.length} by ${u} cells, ${e.axes[0]} by ${e.axes[1]}. Arrow keys move from cell to cell.`,
				style: {
					width: `${p.window[0]}px`,
					height: `${p.window[1] + 1}px`
				},
				onKeyDown: y,
				onPointerMove: (e) => l(_(e)),
				onPointerLeave: () => l(null),
				onClick: (t) => {
					let n = _(t);
					n !== null && (e.onPick ? e.onPick(Math.floor(n / u), n % u) : l(n));
				},
				children: /* @__PURE__ */ J("div", {
					class: "heat-space",
					style: {
						width: `${p.size[0]}px`,
						height: `${p.size[1]}px`
					},
					children: [/* @__PURE__ */ J("canvas", {
						ref: r,
						class: e.onPick ? "pick" : ""
					}), b !== null && /* @__PURE__ */ J("div", {
						class: "heat-mark",
						style: {
							left: `${p.left + b % u * p.cell[0]}px`,
							top: `${g(Math.floor(b / u)) * p.cell[1]}px`,
							width: `${Math.max(3, p.cell[0])}px`,
							height: `${Math.max(3, p.cell[1])}px`
						}
					})]
				})
			}),
			/* @__PURE__ */ J(Ct, {
				scale: d,
				unit: e.unit
			})
		]
	});
}
function xt({ values: e, names: t, labels: n, columns: r, axes: i, unit: a, told: o, place: s }) {
	let c = r.length, l = t?.[s];
	return /* @__PURE__ */ J(y, { children: [
		/* @__PURE__ */ J("b", {
			class: "num",
			children: H(e[s])
		}),
		" ",
		a,
		/* @__PURE__ */ J("span", {
			class: "where",
			children: [
				i[0],
				" ",
				n.rows[Math.floor(s / c)],
				" · ",
				i[1],
				" ",
				n.columns[s % c],
				l ? ` · ${l}` : ""
			]
		}),
		o && /* @__PURE__ */ J("span", {
			class: "beside",
			children: o(s)
		})
	] });
}
function St(e) {
	return `${e.values.length.toLocaleString("en")} cells: point at one, or move with the arrow keys`;
}
function Ct({ scale: e, unit: t }) {
	let n = Array.from({ length: 17 }, (t, n) => st(e.at(e.low + (e.high - e.low) * n / 16))), r = e.signed ? [
		e.low,
		0,
		e.high
	] : ut(e.low, e.high, 4), i = e.signed ? r.map(Fe) : Ie(r), a = (t) => `${100 * (t - e.low) / (e.high - e.low)}%`;
	return /* @__PURE__ */ J("figcaption", {
		class: "legend",
		children: [
			/* @__PURE__ */ J("div", {
				class: "legend-ramp",
				style: { backgroundImage: `linear-gradient(to right, ${n.join(", ")})` }
			}),
			/* @__PURE__ */ J("div", {
				class: "legend-marks",
				children: r.map((e, t) => /* @__PURE__ */ J("span", {
					class: "num",
					style: { left: a(e) },
					children: i[t]
				}))
			}),
			/* @__PURE__ */ J("span", {
				class: "legend-unit",
				children: t
			})
		]
	});
}
var wt = null;
function Tt(e, t) {
	if (wt ??= document.createElement("canvas").getContext("2d"), !wt) return 60;
	wt.font = t;
	let n = 0, r = Math.max(1, Math.floor(e.length / 200));
	for (let t = 0; t < e.length; t += r) n = Math.max(n, wt.measureText(e[t]).width);
	return Math.ceil(n);
}
function Et(e, t, n, r) {
	let [i, a] = [e.rows.length, e.columns.length], o = Math.min(Math.round(n * .34), Math.max(22, Tt(t.rows, _t) + 12), 150), s = Math.max(60, n - o - 2), c = Tt(t.columns, _t), l = e.names ? 62 : 0, u = Math.max(l, s / a);
	u = Math.min(u, e.names ? 104 : 76);
	let d = e.square ? u : Math.min(34, Math.max(Math.min(22, yt / i), 440 / i));
	e.names && (d = 36), e.square && (u = d = Math.min(u, 30, yt / i)), u *= r, d *= r > 1 && !e.square && d >= 20 ? 1 : r;
	let f = c + 10 > u, p = (f ? Math.min(110, c + 10) : 20) + 20, m = [o + u * a + 1, d * i + p], h = m[0] > n ? 14 : 0;
	return {
		left: o,
		bottom: p,
		cell: [u, d],
		size: m,
		window: [Math.min(n, Math.ceil(m[0])), Math.min(yt + p, Math.ceil(m[1])) + h],
		turned: f
	};
}
function Dt(e) {
	let t = 1e400, n = -1e400;
	for (let r = 0; r < e.length; r++) {
		let i = e[r];
		i < t && i > -1e400 && (t = i), i > n && i < 1e400 && (n = i);
	}
	return t > n ? [0, 1] : [t, n];
}
var Ot = class {
	values;
	rows;
	columns;
	scale;
	made = /* @__PURE__ */ new Map();
	constructor(e, t, n, r) {
		this.values = e, this.rows = t, this.columns = n, this.scale = r;
	}
	pooled(e, t) {
		let n = `${e},${t}`, r = this.made.get(n);
		if (r) return r;
		let [i, a] = [Math.ceil(this.columns / e), Math.ceil(this.rows / t)], o = document.createElement("canvas");
		[o.width, o.height] = [i, a];
		let s = o.getContext("2d");
		if (s) {
			let n = s.createImageData(i, a), r = new Uint32Array(n.data.buffer), { of: o, colours: c } = lt(this.scale);
			for (let n = 0; n < a; n++) for (let a = 0; a < i; a++) r[n * i + a] = c[o(this.largest(a * e, n * t, e, t))];
			s.putImageData(n, 0, 0);
		}
		return this.made.size > 3 && this.made.clear(), this.made.set(n, o), o;
	}
	largest(e, t, n, r) {
		if (n === 1 && r === 1) return this.values[t * this.columns + e];
		let i = NaN;
		for (let a = t; a < Math.min(this.rows, t + r); a++) for (let t = e; t < Math.min(this.columns, e + n); t++) {
			let e = this.values[a * this.columns + t];
			!(Math.abs(e) <= Math.abs(i)) && !Number.isNaN(e) && (i = e);
		}
		return i;
	}
};
function kt(e, t, n, r, i, a, o) {
	let s = e.getContext("2d");
	if (!s) return;
	let c = Math.min(3, devicePixelRatio || 1), l = i.size[0] > i.window[0] ? 14 : 0, [u, d] = [i.window[0], i.window[1] - l];
	(e.width !== Math.round(u * c) || e.height !== Math.round(d * c)) && (e.width = Math.round(u * c), e.height = Math.round(d * c), e.style.width = `${u}px`, e.style.height = `${d}px`);
	let f = getComputedStyle(t).color;
	s.setTransform(c, 0, 0, c, 0, 0), s.clearRect(0, 0, u, d);
	let [p, m] = i.cell, [h, g] = [n.rows.length, n.columns.length], _ = d - i.bottom, [v, y] = [t.scrollLeft, t.scrollTop];
	s.save(), s.beginPath(), s.rect(i.left, 0, u - i.left, Math.min(_, m * h)), s.clip(), p < 5 || m < 5 ? At(s, o, n, i, v, y, c) : jt(s, n, i, a, v, y, u, _), s.restore(), s.fillStyle = f, s.font = _t, s.textBaseline = "middle", s.textAlign = "right";
	let b = Math.max(1, Math.ceil(14 / m));
	for (let e = 0; e < h; e++) {
		let t = n.upward ? h - 1 - e : e, a = e * m - y + m / 2;
		t % b || a < 0 || a > _ || s.fillText(Mt(s, r.rows[t], i.left - 8), i.left - 8, a);
	}
	let x = Math.max(1, Math.ceil((i.turned ? 14 : 18) / p));
	for (let e = 0; e < g; e += x) {
		let t = i.left + e * p - v + p / 2;
		t < i.left || t > u || (s.save(), s.translate(t, Math.min(_, m * h) + 6), i.turned ? (s.rotate(-Math.PI / 2), s.textAlign = "right", s.fillText(Mt(s, r.columns[e], i.bottom - 26), 0, 0)) : (s.textAlign = "center", s.textBaseline = "top", s.fillText(r.columns[e], 0, 1)), s.restore());
	}
	s.fillStyle = f, s.font = vt, s.textAlign = "left", s.textBaseline = "alphabetic", s.fillText(`${n.axes[1]} →   ${n.axes[0]} ${n.upward ? "↑" : "↓"}`, i.left, d - 4);
}
function At(e, t, n, r, i, a, o) {
	let [s, c] = r.cell, l = Math.max(1, Math.ceil(1 / (s * o) - 1e-9)), u = Math.max(1, Math.ceil(1 / (c * o) - 1e-9)), d = t.pooled(l, u);
	e.imageSmoothingEnabled = !1;
	let f = n.rows.length;
	n.upward ? (e.translate(0, f * c - a), e.scale(1, -1), e.drawImage(d, r.left - i, 0, d.width * l * s, d.height * u * c)) : e.drawImage(d, r.left - i, -a, d.width * l * s, d.height * u * c);
}
function jt(e, t, n, r, i, a, o, s) {
	let [c, l] = n.cell, [u, d] = [t.rows.length, t.columns.length], f = c > 12 && l > 10 ? 1.5 : c > 7 && l > 7 ? .5 : 0, p = c > 20 && l > 16 ? 3 : 0, m = !t.square && c >= 40 && l >= 17;
	e.font = vt, e.textAlign = "center", e.textBaseline = "middle";
	let h = Math.max(0, Math.floor(i / c)), g = Math.min(d, Math.ceil((i + o - n.left) / c));
	for (let o = Math.max(0, Math.floor(a / l)); o < Math.min(u, Math.ceil((a + s) / l)); o++) {
		let s = t.upward ? u - 1 - o : o;
		for (let u = h; u < g; u++) {
			let h = s * d + u, g = t.values[h], [_, v] = [n.left + u * c - i, o * l - a], y = r.at(g);
			if (e.fillStyle = st(y), e.beginPath(), e.roundRect(_ + f / 2, v + f / 2, c - f, l - f, p), e.fill(), t.marked?.has(h) && (e.strokeStyle = ct(y), e.lineWidth = 2, e.stroke()), !m) continue;
			e.fillStyle = ct(y);
			let b = t.names?.[h];
			b && l >= 32 ? (e.fillText(Mt(e, b, c - 6), _ + c / 2, v + l / 2 - 7), e.globalAlpha = .78, e.fillText(Fe(g), _ + c / 2, v + l / 2 + 8), e.globalAlpha = 1) : e.fillText(Fe(g), _ + c / 2, v + l / 2 + .5);
		}
	}
}
function Mt(e, t, n) {
	if (e.measureText(t).width <= n) return t;
	let r = t.length;
	for (; r > 1 && e.measureText(`${t.slice(0, r)}…`).width > n;) r--;
	return `${t.slice(0, r)}…`;
}
// src/number.tsx
var Nt = 24;
function Pt({ doc: e, chosen: t }) {
	let n = t.name === e.main, r = (t) => {
		let n = V(e, t);
		return n && n.axes.length === 0 ? B(n)?.[0] ?? null : null;
	}, i = (e) => r(`${t.name}_${e}`) ?? (n ? r(e) : null), a = n ? V(e, "null") : void 0, o = a && a.axes.length && a.unit === t.unit ? Array.from(B(a) ?? []) : void 0, s = n ? (e.tables.groups?.rows ?? []).slice(0, Nt) : [];
	return /* @__PURE__ */ J(dt, {
		bars: [{
			name: s.length ? "all" : U(t.name),
			value: B(t)?.[0] ?? NaN,
			low: i("low"),
			high: i("high"),
			draws: o,
			nullMean: n ? r("null") ?? r("null_mean") : null,
			nullLow: n ? r("null_low") : null,
			nullHigh: n ? r("null_high") : null,
			strong: s.length > 0
		}, ...s.map(Ft)],
		unit: t.unit,
		label: `${U(t.name)} in ${t.unit}`
	});
}
function Ft(e) {
	let t = (t) => typeof e[t] == "number" ? e[t] : null;
	return {
		name: String(e.group),
		value: t("value") ?? NaN,
		low: t("low"),
		high: t("high")
	};
}
// src/table.tsx
var It = 12;
function Lt({ rows: e, n: t, title: n, open: r, link: i }) {
	let a = z(() => [...new Set(e.flatMap((e) => Object.keys(e)))], [e]), [o, s] = I(null), [c, l] = I(!!r), u = z(() => new Set(a.filter((t) => e.some((e) => typeof e[t] == "number") && e.every((e) => Bt(e[t])))), [e]), d = z(() => o ? [...e].sort((e, t) => Vt(e[o.column], t[o.column]) * (o.down ? -1 : 1)) : e, [e, o]);
	if (!e.length) return null;
	let f = c ? d : d.slice(0, It), p = t ?? e.length;
	return /* @__PURE__ */ J("div", {
		class: "table-box",
		children: [/* @__PURE__ */ J("div", {
			class: "table-bar",
			children: [
				n && /* @__PURE__ */ J("h3", { children: n }),
				/* @__PURE__ */ J("span", {
					class: "count",
					children: p > f.length ? `${f.length} of ${p.toLocaleString("en")} rows` : `${p} row${p === 1 ? "" : "s"}`
				}),
				e.length > It && /* @__PURE__ */ J("button", {
					type: "button",
					class: "quiet",
					"aria-expanded": c,
					onClick: () => l(!c),
					children: c ? "Fewer" : `All ${e.length}`
				}),
				/* @__PURE__ */ J(tt, {
					label: "Copy as CSV",
					text: () => Ht(a, d)
				})
			]
		}), /* @__PURE__ */ J("div", {
			class: "table-scroll",
			tabIndex: 0,
			role: "region",
			"aria-label": n ?? "Table",
			children: /* @__PURE__ */ J("table", { children: [/* @__PURE__ */ J("thead", { children: /* @__PURE__ */ J("tr", { children: a.map((e) => /* @__PURE__ */ J("th", {
				class: u.has(e) ? "num" : "",
				"aria-sort": o?.column === e ? o.down ? "descending" : "ascending" : "none",
				children: /* @__PURE__ */ J("button", {
					type: "button",
					onClick: () => s({
						column: e,
						down: o?.column === e ? !o.down : u.has(e)
					}),
					children: [e.replace(/_/g, " ") || "what", /* @__PURE__ */ J("span", {
						"aria-hidden": "true",
						children: o?.column === e ? o.down ? " ↓" : " ↑" : ""
					})]
				})
			})) }) }), /* @__PURE__ */ J("tbody", { children: f.map((e) => /* @__PURE__ */ J("tr", { children: a.map((t, n) => {
				let r = zt(e[t]), o = n === Rt(a) ? i?.(e) : void 0;
				return /* @__PURE__ */ J("td", {
					class: u.has(t) ? "num" : r.length <= 24 ? "whole" : "",
					children: o ? /* @__PURE__ */ J("a", {
						href: o,
						children: r
					}) : r
				});
			}) })) })] })
		})]
	});
}
function Rt(e) {
	let t = e.indexOf("part");
	return t < 0 ? 0 : t;
}
function zt(e) {
	return typeof e == "string" ? G(e) : Array.isArray(e) ? e.map((e) => typeof e == "string" ? G(e) : ze(e)).join(", ") : ze(e);
}
function Bt(e) {
	return typeof e == "number" || e == null || e === "inf" || e === "-inf";
}
function Vt(e, t) {
	return typeof e == "number" && typeof t == "number" ? e - t : typeof e == "number" || typeof t == "number" ? typeof e == "number" ? 1 : -1 : ze(e).localeCompare(ze(t), "en", { numeric: !0 });
}
function Ht(e, t) {
	let n = (e) => {
		let t = typeof e == "number" ? String(e) : ze(e), n = typeof e == "string" && /^[=+\-@\t\r]/.test(t) ? `'${t}` : t;
		return /[",\n\r]/.test(n) ? `"${n.replace(/"/g, "\"\"")}"` : n;
	};
	return [e, ...t.map((t) => e.map((e) => t[e]))].map((e) => e.map((e) => n(e)).join(",")).join("\n") + "\n";
}
// src/tokens.tsx
function Ut({ tokens: e, values: t, unit: n, label: r, chosen: i, onPick: a, legend: o }) {
	let s = $e(), c = t ? Array.from(t).filter(Number.isFinite) : [], l = c.length ? at(Math.min(...c, 0), Math.max(...c), s) : null;
	return /* @__PURE__ */ J("div", {
		class: "tokens-box",
		children: [/* @__PURE__ */ J("div", {
			class: "tokens",
			role: "group",
			"aria-label": r,
			children: e.map((e, r) => {
				let o = t?.[r], s = l && o !== void 0 ? l.at(o) : null, c = `${r} ${G(e)}${o === void 0 ? "" : `: ${H(o)} ${n ?? ""}`}`, u = s ? {
					background: st(s),
					color: ct(s)
				} : {}, d = /* @__PURE__ */ J(y, { children: [e.startsWith(" ") ? /* @__PURE__ */ J("span", {
					class: "space",
					children: " "
				}) : null, G(e.trim() ? e.trim() : e)] });
				return a ? /* @__PURE__ */ J("button", {
					type: "button",
					class: "token",
					style: u,
					title: c,
					"aria-pressed": i === r,
					onClick: () => a(r),
					children: d
				}) : /* @__PURE__ */ J("span", {
					class: `token ${i === r ? "chosen" : ""}`,
					style: u,
					title: c,
					children: d
				});
			})
		}), o && l && /* @__PURE__ */ J(Ct, {
			scale: l,
			unit: n ?? ""
		})]
	});
}
// src/wiring.tsx
var Wt = 34, Gt = 62, Kt = 34, qt = {
	q: "queries",
	k: "keys",
	v: "values"
};
function Jt(e) {
	let t = /^L(\d+)\.(.+)$/.exec(e);
	if (!t) return /^(embed|positions)/.test(e) ? {
		part: e.split(".")[0],
		column: "in",
		reads: ""
	} : {
		part: e,
		column: "out",
		reads: "output"
	};
	let [, n, r] = t, i = /\.(q|k|v)$/.exec(r)?.[1] ?? "", a = r.replace(/\.(q|k|v)$/, "").replace(/\.(C\d+|bias|in|out)$/, "");
	return {
		part: `L${n}.${a}`,
		column: n,
		reads: i ? qt[i] : /^(mlp|E\d|router|N\d)/.test(a) ? "MLPs" : "other"
	};
}
function Yt(e) {
	let t = /\.(H|KV|E|N|attn|mlp)(\d*)/.exec(e);
	return [
		"H",
		"KV",
		"attn",
		"mlp",
		"E",
		"N"
	].indexOf(t?.[1] ?? "") * 1e6 + Number(t?.[2] ?? 0);
}
function Xt(e) {
	let t = /* @__PURE__ */ new Map();
	for (let n of e) for (let e of [Jt(n.from), Jt(n.to)]) t.set(e.column, (t.get(e.column) ?? /* @__PURE__ */ new Set()).add(e.part));
	let n = [...t.keys()].sort((e, t) => e === "in" ? -1 : t === "in" || e === "out" ? 1 : t === "out" ? -1 : Number(e) - Number(t)), r = /* @__PURE__ */ new Map(), i = 0;
	n.forEach((e, n) => {
		let a = [...t.get(e)].sort((e, t) => Yt(e) - Yt(t) || e.localeCompare(t));
		i = Math.max(i, a.length), a.forEach((e, t) => r.set(e, {
			part: e,
			column: n,
			row: t
		}));
	});
	for (let e of r.values()) {
		let t = [...r.values()].filter((t) => t.column === e.column).length;
		e.row += (i - t) / 2;
	}
	return {
		jacks: r,
		columns: n,
		rows: i
	};
}
function Zt({ doc: e, link: t }) {
	let n = e.cables, r = R(null), i = Qe(r), [a, o] = I(Math.min(n.lines.length, n.smallest ?? 24)), [s, c] = I(""), [l, u] = I(!1), [d, f] = I(""), [p, m] = I(null), h = n.lines.some((e) => e.p !== null), g = z(() => [...new Set(n.lines.map((e) => Jt(e.to).reads).filter(Boolean))].sort(), [n]), { jacks: _, columns: v, rows: b } = z(() => Xt(n.lines), [n]), x = n.lines.map((e, t) => ({
		cable: e,
		i: t,
		from: Jt(e.from),
		to: Jt(e.to)
	})).slice(0, a).filter(({ cable: e, from: t, to: n }) => (!s || n.reads === s) && (!l || e.p !== null && e.p <= .05) && (!d || t.part === d || n.part === d)), S = Math.max(...n.lines.map((e) => Math.abs(e.score)), 1e-12), C = Math.max(118, (i - Gt - 8) / Math.max(1, v.length - 1)), [w, T] = [C * (v.length - 1) + Gt + 8, Kt + b * Wt + 6], E = (e) => 4 + e.column * C, D = (e) => Kt + (e.row + .5) * Wt, O = new Set(x.flatMap(({ from: e, to: t }) => [e.part, t.part])), k = x.find((e) => e.i === p), A = d ? t?.(d) : void 0;
	return /* @__PURE__ */ J("div", {
		class: "wiring",
		ref: r,
		children: [
			/* @__PURE__ */ J("div", {
				class: "wiring-bar",
				children: [
					/* @__PURE__ */ J("label", {
						class: "wiring-most",
						children: [
							"strongest ",
							/* @__PURE__ */ J("input", {
								type: "range",
								min: 1,
								max: n.lines.length,
								value: a,
								onInput: (e) => o(Number(e.currentTarget.value)),
								"aria-valuetext": `${a} of ${n.lines.length}`
							}),
							" ",
							/* @__PURE__ */ J("b", {
								class: "num",
								children: a
							}),
							" of ",
							n.n
						]
					}),
					g.length > 1 && /* @__PURE__ */ J("label", {
						class: "pick",
						children: [/* @__PURE__ */ J("span", { children: "read by" }), /* @__PURE__ */ J("select", {
							value: s,
							onChange: (e) => c(e.currentTarget.value),
							children: [/* @__PURE__ */ J("option", {
								value: "",
								children: "all"
							}), g.map((e) => /* @__PURE__ */ J("option", {
								value: e,
								children: e
							}))]
						})]
					}),
					h && /* @__PURE__ */ J("label", {
						class: "tick",
						children: [/* @__PURE__ */ J("input", {
							type: "checkbox",
							checked: l,
							onChange: (e) => u(e.currentTarget.checked)
						}), " adjusted p ≤ 0.05"]
					}),
					d && /* @__PURE__ */ J("button", {
						type: "button",
						class: "quiet",
						onClick: () => f(""),
						children: [
							"All parts (now ",
							d,
							")"
						]
					})
				]
			}),
			/* @__PURE__ */ J("output", {
				class: "readout",
				"aria-live": "polite",
				children: k ? /* @__PURE__ */ J(y, { children: [
					/* @__PURE__ */ J("b", {
						class: "num",
						children: H(k.cable.score)
					}),
					" ",
					/* @__PURE__ */ J("span", {
						class: "where",
						children: [
							k.cable.from,
							" → ",
							k.cable.to,
							k.cable.p === null ? "" : ` · p ${H(k.cable.p)}`,
							" · number ",
							k.i + 1
						]
					})
				] }) : /* @__PURE__ */ J("span", {
					class: "hint",
					children: [
						x.length,
						" cable",
						x.length === 1 ? "" : "s",
						": point at one, or choose a part",
						n.smallest ? `; the first ${n.smallest} are the circuit` : ""
					]
				})
			}),
			/* @__PURE__ */ J("div", {
				class: "wiring-scroll",
				tabIndex: 0,
				role: "region",
				"aria-label": "Wiring, layers from left to right",
				children: /* @__PURE__ */ J("svg", {
					width: w,
					height: T,
					viewBox: `0 0 ${w} ${T}`,
					role: "group",
					"aria-label": `${x.length} cables between ${_.size} parts`,
					children: [
						v.map((e, t) => /* @__PURE__ */ J("text", {
							class: "wiring-layer",
							x: 4 + t * C + Gt / 2,
							y: 16,
							"text-anchor": "middle",
							children: e === "in" ? "text" : e === "out" ? "output" : `layer ${e}`
						})),
						[...x].reverse().map(({ cable: e, i: t, from: n, to: r }) => {
							let [i, a] = [_.get(n.part), _.get(r.part)], [o, s, c, l] = [
								E(i) + Gt - 3,
								D(i),
								E(a) + 3,
								D(a)
							], u = Math.max(30, (c - o) * .45), d = Math.abs(e.score) / S, f = i.column === a.column ? `M${o} ${s} C${o + 34} ${s}, ${o + 34} ${l}, ${o} ${l}` : `M${o} ${s} C${o + u} ${s}, ${c - u} ${l}, ${c} ${l}`;
							return /* @__PURE__ */ J("g", {
								class: `cable ${e.score < 0 ? "below" : ""} ${e.p !== null && e.p > .05 ? "unsure" : ""} ${p === t ? "chosen" : ""}`,
								onPointerEnter: () => m(t),
								onPointerLeave: () => m(null),
								children: [/* @__PURE__ */ J("path", {
									class: "reach",
									d: f
								}), /* @__PURE__ */ J("path", {
									d: f,
									style: {
										strokeWidth: `${1 + 6 * d}px`,
										opacity: String(.3 + .7 * Math.sqrt(d))
									}
								})]
							});
						}),
						[..._.values()].map((e) => /* @__PURE__ */ J("g", {
							class: `plug ${O.has(e.part) ? "lit" : ""} ${d === e.part ? "chosen" : ""}`,
							role: "button",
							tabindex: 0,
							"aria-pressed": d === e.part,
							"aria-label": `${e.part}: its cables alone`,
							onClick: () => f(d === e.part ? "" : e.part),
							onKeyDown: (t) => {
								(t.key === "Enter" || t.key === " ") && (t.preventDefault(), f(d === e.part ? "" : e.part));
							},
							children: [/* @__PURE__ */ J("rect", {
								x: E(e),
								y: D(e) - 12,
								width: Gt,
								height: 24,
								rx: 12
							}), /* @__PURE__ */ J("text", {
								x: E(e) + Gt / 2,
								y: D(e) + 4,
								"text-anchor": "middle",
								children: e.part.replace(/^L\d+\./, "")
							})]
						}))
					]
				})
			}),
			/* @__PURE__ */ J("p", {
				class: "key",
				children: [
					/* @__PURE__ */ J("span", { children: [/* @__PURE__ */ J("i", { class: "key-cable" }), "above 0, as wide as its score"] }),
					n.lines.some((e) => e.score < 0) && /* @__PURE__ */ J("span", { children: [/* @__PURE__ */ J("i", { class: "key-cable below" }), "below 0"] }),
					h && /* @__PURE__ */ J("span", { children: [/* @__PURE__ */ J("i", { class: "key-cable unsure" }), "p above 0.05"] }),
					A && /* @__PURE__ */ J("a", {
						href: A,
						children: ["The card of ", d]
					})
				]
			})
		]
	});
}
// src/result.tsx
var Qt = /* @__PURE__ */ new Set([
	"strength",
	"n_parts",
	"position",
	"query",
	"key",
	"draw",
	"prompt",
	"layer",
	"chunk",
	"offset"
]), $t = /* @__PURE__ */ new Set([
	"position",
	"query",
	"key"
]), en = 24;
function tn({ doc: e, slices: t, link: n }) {
	return e.kind === "knob" ? /* @__PURE__ */ J(rn, {
		doc: e,
		slices: t,
		link: n
	}) : /* @__PURE__ */ J(nn, {
		doc: e,
		slices: t,
		link: n
	});
}
function nn({ doc: e, slices: t, link: n }) {
	let r = e.sections.find((e) => e.name === "in short"), i = e.sections.filter((e) => e !== r);
	return /* @__PURE__ */ J(y, { children: [
		r && /* @__PURE__ */ J(Y, {
			title: "In short",
			class: "lead",
			children: r.notes.map((e) => /* @__PURE__ */ J("p", { children: e }))
		}),
		e.cables && /* @__PURE__ */ J(Y, {
			title: e.cables.smallest ? "Circuit" : "Wiring",
			class: "figure",
			children: /* @__PURE__ */ J(Zt, {
				doc: e,
				link: n
			})
		}),
		/* @__PURE__ */ J(sn, {
			doc: e,
			slices: t,
			link: n
		}),
		/* @__PURE__ */ J(wn, { doc: e }),
		/* @__PURE__ */ J(En, { doc: e }),
		i.length > 0 && /* @__PURE__ */ J(Y, {
			title: "What was found",
			children: i.map((e) => /* @__PURE__ */ J("div", {
				class: "told-section",
				children: [e.rows.length ? /* @__PURE__ */ J(Lt, {
					rows: e.rows,
					n: e.n,
					title: U(e.name),
					link: Cn(n)
				}) : /* @__PURE__ */ J("h3", { children: U(e.name) }), e.notes.map((e) => /* @__PURE__ */ J("p", {
					class: "note",
					children: e
				}))]
			}))
		}),
		e.notes.length > 0 && /* @__PURE__ */ J(Y, {
			title: "Notes",
			children: /* @__PURE__ */ J("ul", {
				class: "notes",
				children: e.notes.map((e) => /* @__PURE__ */ J("li", { children: e }))
			})
		}),
		/* @__PURE__ */ J(Dn, {
			doc: e,
			link: n
		}),
		/* @__PURE__ */ J(On, {
			provenance: e.provenance,
			python: e.python
		})
	] });
}
function rn({ doc: e, slices: t, link: n }) {
	return /* @__PURE__ */ J(y, { children: [
		/* @__PURE__ */ J(Y, {
			title: "What it does",
			children: [
				/* @__PURE__ */ J("p", { children: [
					/* @__PURE__ */ J("b", { children: e.name }),
					" at strength ",
					/* @__PURE__ */ J("b", {
						class: "num",
						children: H(e.strength)
					}),
					"; neutral at ",
					H(e.neutral),
					".",
					" ",
					e.n_edits,
					" edit",
					e.n_edits === 1 ? "" : "s",
					"."
				] }),
				/* @__PURE__ */ J("ul", {
					class: "edits",
					children: e.edits.slice(0, 24).map((e) => /* @__PURE__ */ J("li", { children: /* @__PURE__ */ J("code", { children: e }) }))
				}),
				e.n_edits > 24 && /* @__PURE__ */ J("p", {
					class: "note",
					children: [
						"and ",
						e.n_edits - 24,
						" more"
					]
				})
			]
		}),
		Object.entries(e.evidence).map(([e, r]) => /* @__PURE__ */ J(y, { children: [/* @__PURE__ */ J("h2", {
			class: "evidence",
			children: ["Evidence: ", U(e)]
		}), /* @__PURE__ */ J(nn, {
			doc: r,
			slices: t,
			link: n
		})] })),
		/* @__PURE__ */ J(On, {
			provenance: e.provenance,
			python: ""
		})
	] });
}
function an(e) {
	return e.variables.filter((t) => t.axes.length > 0 && t.shape.every((e) => e > 0) || on(e, t));
}
function on(e, t) {
	return t.name === e.main && t.axes.length === 0 && Number.isFinite(B(t)?.[0]) && !!(V(e, "low") ?? V(e, "null") ?? e.tables.groups);
}
function sn({ doc: e, slices: t, link: n }) {
	let r = an(e), [i, a] = I(e.tables.dose && V(e, "effect") ? "effect" : e.main), o = r.find((e) => e.name === i) ?? r[0];
	if (!o) return null;
	let s = r.length > 1 && /* @__PURE__ */ J("label", {
		class: "pick",
		children: [/* @__PURE__ */ J("span", { children: "Shown" }), /* @__PURE__ */ J("select", {
			value: o.name,
			onChange: (e) => a(e.currentTarget.value),
			children: r.map((e) => /* @__PURE__ */ J("option", {
				value: e.name,
				children: [U(e.name), e.axes.length ? ` (${e.axes.map(U).join(" × ")})` : ""]
			}))
		})]
	});
	return /* @__PURE__ */ J(Y, {
		title: o.unit && o.unit !== o.name ? `${cn(U(o.name))}, ${o.unit}` : cn(U(o.name)),
		aside: s,
		class: "figure",
		children: /* @__PURE__ */ J(ln, {
			doc: e,
			chosen: o,
			slices: t,
			link: n
		})
	});
}
function cn(e) {
	return e.charAt(0).toUpperCase() + e.slice(1);
}
function ln({ doc: e, chosen: t, slices: n, link: r }) {
	let i = t.name === e.main;
	if (!t.axes.length) return /* @__PURE__ */ J(Pt, {
		doc: e,
		chosen: t
	});
	if (t.axes.length === 1) return /* @__PURE__ */ J(dn, {
		doc: e,
		chosen: t,
		main: i,
		link: r
	});
	let [a, o] = t.axes;
	return t.axes.length === 2 && un(a, o, e) ? /* @__PURE__ */ J(mn, {
		doc: e,
		chosen: t
	}) : /* @__PURE__ */ J("div", {
		class: i && e.ranked && t.shape[1] <= 12 ? "two" : "one",
		children: [/* @__PURE__ */ J("div", { children: /* @__PURE__ */ J(_n, {
			doc: e,
			chosen: t,
			slices: n
		}) }), i && e.ranked && /* @__PURE__ */ J("div", { children: /* @__PURE__ */ J(Sn, {
			doc: e,
			link: r
		}) })]
	});
}
function un(e, t, n) {
	let r = (e) => Qt.has(e) && (n.steps[e] ?? []).every((e) => typeof e == "number"), i = (e) => e === "condition" || e === "draw";
	return i(e) && r(t) || i(t) && r(e);
}
function dn({ doc: e, chosen: t, main: n, link: r }) {
	let i = t.axes[0], a = e.steps[i] ?? [], o = B(t);
	if (!o) return /* @__PURE__ */ J(gn, {});
	if (n && e.ranked) return /* @__PURE__ */ J(Sn, {
		doc: e,
		link: r
	});
	if (Qt.has(i) && a.every((e) => typeof e == "number") && a.length > 1) return /* @__PURE__ */ J(pt, {
		x: a,
		lines: pn(e, t),
		axis: U(i),
		unit: t.unit,
		label: `${U(t.name)} in ${t.unit}`
	});
	let s = e.labels[i] ?? [], c = Array.from(o, (n, r) => ({
		name: s[r] ?? String(r),
		value: n,
		...fn(e, t, r)
	})).filter((e) => !Number.isNaN(e.value)), l = [...c].sort((e, t) => Math.abs(t.value) - Math.abs(e.value)).slice(0, en), u = c.length > en ? c.filter((e) => l.includes(e)) : c;
	return /* @__PURE__ */ J(y, { children: [
		$t.has(i) && /* @__PURE__ */ J(Ut, {
			tokens: s,
			values: o,
			unit: t.unit,
			label: U(t.name),
			legend: !0
		}),
		/* @__PURE__ */ J(dt, {
			bars: u,
			unit: t.unit,
			label: U(t.name)
		}),
		c.length > en && /* @__PURE__ */ J("p", {
			class: "note",
			children: [
				"The ",
				en,
				" largest of ",
				c.length,
				", either sign."
			]
		})
	] });
}
function fn(e, t, n) {
	let r = (r) => (t.name === e.main ? Pe(e, r)?.[n] : null) ?? null, i = (i) => {
		let a = V(e, `${t.name}_${i}`);
		return a && a.axes.join() === t.axes.join() ? B(a)?.[n] ?? null : r(i);
	};
	return {
		low: i("low"),
		high: i("high"),
		nullMean: r("null_mean"),
		nullHigh: r("null_high"),
		nullLow: r("null_low")
	};
}
function pn(e, t) {
	let n = e.variables.filter((e) => e.axes.join() === t.axes.join() && e.unit === t.unit), r = (e) => {
		let t = n.find((t) => t.name === e);
		return t ? B(t) : null;
	}, i = (e) => ({
		low: r(`${e}_low`),
		high: r(`${e}_high`)
	}), a = i(t.name).low ? i(t.name) : t.name === e.main ? {
		low: r("low"),
		high: r("high")
	} : {}, o = [{
		name: U(t.name),
		y: B(t) ?? [],
		...a
	}];
	for (let e of [
		"null",
		"chance",
		"random"
	]) {
		let n = r(`${e}_mean`) ?? r(e), a = i(e);
		e !== t.name && (n || a.low) && o.push({
			name: "random control",
			y: n ?? Array.from(t.data ? B(t) ?? [] : [], () => NaN),
			...a,
			control: !0
		});
	}
	return o;
}
function mn({ doc: e, chosen: t }) {
	let n = B(t);
	if (!n) return /* @__PURE__ */ J(gn, {});
	let r = Qt.has(t.axes[1]) && t.axes[1] !== "draw" ? 1 : 0, [i, a] = [t.axes[r], t.axes[1 - r]], o = e.steps[i]?.length ?? 0, s = (n, i) => {
		let a = t.name === e.main ? Pe(e, n) : null;
		return a && hn(a, t.shape, r, i, o);
	}, c = (e.labels[a] ?? []).map((e, i) => ({
		name: e,
		y: hn(n, t.shape, r, i, o),
		low: s("low", i),
		high: s("high", i),
		control: a === "draw" || /random|control/.test(e)
	}));
	return /* @__PURE__ */ J(pt, {
		x: e.steps[i],
		lines: c.slice(0, 24),
		axis: U(i),
		unit: t.unit,
		label: U(t.name)
	});
}
function hn(e, t, n, r, i) {
	return Array.from({ length: i }, (i, a) => e[n === 1 ? Be(t, [r, a]) : Be(t, [a, r])]);
}
function gn() {
	return /* @__PURE__ */ J("p", {
		class: "note",
		children: "These numbers are too many to be in this file; open the saved folder with patchbay ui."
	});
}
function _n({ doc: e, chosen: t, slices: n }) {
	let r = t.axes.slice(0, -2), [i, a] = I(r.map(() => 0)), [o, s] = t.axes.slice(-2), { values: c, failed: l } = yn(t, r.length === i.length ? i : r.map(() => 0), n), u = t.name === e.main, d = z(() => bn(e, t), [e, t]), f = z(() => xn(e, t), [e, t]);
	L(() => a(r.map(() => 0)), [t.name]);
	let p = (t) => e.labels[t] ?? [];
	return /* @__PURE__ */ J(y, { children: [r.length > 0 && /* @__PURE__ */ J("div", {
		class: "choose",
		children: r.map((e, t) => /* @__PURE__ */ J("label", {
			class: "pick",
			children: [/* @__PURE__ */ J("span", { children: U(e) }), /* @__PURE__ */ J("select", {
				value: String(i[t]),
				onChange: (e) => a(i.map((n, r) => r === t ? Number(e.currentTarget.value) : n)),
				children: p(e).map((e, t) => /* @__PURE__ */ J("option", {
					value: String(t),
					children: e
				}))
			})]
		}))
	}), l ? /* @__PURE__ */ J(Z, { message: l }) : c ? /* @__PURE__ */ J(vn, {
		doc: e,
		chosen: t,
		values: c,
		row: o,
		column: s,
		names: u ? e.names : null,
		told: r.length ? void 0 : d,
		marked: u ? f : void 0
	}) : /* @__PURE__ */ J("div", {
		class: "waiting",
		"aria-busy": "true",
		children: [
			"Reading ",
			U(t.name),
			" …"
		]
	})] });
}
function vn(e) {
	let { doc: t, chosen: n, values: r, row: i, column: a } = e, o = i === "query" && a === "key", s = t.labels[a] ?? [], [c, l] = I(Math.max(0, (t.labels[i]?.length ?? 1) - 1)), u = n.axes.length > 2 && n.low !== null && n.high !== null ? [n.low, n.high] : void 0;
	return /* @__PURE__ */ J(y, { children: [o && s.length <= 256 && /* @__PURE__ */ J("div", {
		class: "attended",
		children: [/* @__PURE__ */ J("p", {
			class: "note",
			children: "What the chosen token attends to; choose another one."
		}), /* @__PURE__ */ J(Ut, {
			tokens: s,
			values: r.subarray(c * s.length, (c + 1) * s.length),
			unit: n.unit,
			label: "Attention from the chosen token",
			chosen: c,
			onPick: l
		})]
	}), /* @__PURE__ */ J(bt, {
		values: r,
		rows: t.labels[i] ?? [],
		columns: s,
		axes: [U(i), U(a)],
		unit: n.unit,
		label: `${U(n.name)} in ${n.unit}`,
		upward: i === "layer",
		square: o,
		names: e.names,
		...e.marked ? { marked: e.marked } : {},
		...u ? { range: u } : {},
		...e.told ? { told: e.told } : {},
		...o ? { onPick: (e) => l(e) } : {}
	})] });
}
function yn(e, t, n) {
	let r = B(e), [i, a] = I({
		key: "",
		values: null,
		failed: ""
	}), o = `${e.name}:${t.join()}`;
	if (L(() => {
		if (r || i.key === o) return;
		let s = !0;
		return n ? n(e, t).then((e) => s && a({
			key: o,
			values: e,
			failed: ""
		}), (e) => s && a({
			key: o,
			values: null,
			failed: e.message
		})) : a({
			key: o,
			values: null,
			failed: "These numbers are too many to be in this file; open the saved folder with patchbay ui."
		}), () => {
			s = !1;
		};
	}, [o, r]), !r) return i.key === o ? i : {
		values: null,
		failed: ""
	};
	let s = e.shape.slice(-2).reduce((e, t) => e * t, 1), c = Be(e.shape.slice(0, -2), t);
	return {
		values: r.length === s ? r : r.subarray(c * s, (c + 1) * s),
		failed: ""
	};
}
function bn(e, t) {
	if (t.name !== e.main) return;
	let n = e.variables.filter((e) => e !== t && e.axes.join() === t.axes.join() && e.data !== null);
	if (!n.length) return;
	let [r, i] = ["low", "high"].map((e) => n.find((t) => t.name === e));
	return (e) => {
		let t = r && i ? [`95 % ${H(B(r)?.[e])} to ${H(B(i)?.[e])}`] : [];
		for (let a of n.filter((e) => e !== r && e !== i && e.unit !== "token id").slice(0, 4)) t.push(`${U(a.name)} ${H(B(a)?.[e])}`);
		return t.join(" · ");
	};
}
function xn(e, t) {
	let n = /* @__PURE__ */ new Set();
	if (!e.ranked || t.axes.length !== 2) return n;
	let [r, i] = t.axes.map((t) => e.steps[t] ?? []);
	for (let a of e.highlights) {
		let e = /^L(\d+)\.[A-Z](\d+)$/.exec(a), o = e ? [r.indexOf(Number(e[1])), i.indexOf(Number(e[2]))] : [-1, -1];
		o[0] >= 0 && o[1] >= 0 && n.add(Be(t.shape, o));
	}
	return n;
}
function Sn({ doc: e, link: t }) {
	let n = V(e, e.main), r = (t, r) => {
		let i = t[r];
		return typeof i == "number" && V(e, r)?.unit === n?.unit ? i : null;
	}, i = e.rows.slice(0, en).sort((e, t) => Number(t.value) - Number(e.value)).map((n) => ({
		name: String(n.part),
		value: Number(n.value),
		low: r(n, "low"),
		high: r(n, "high"),
		nullMean: r(n, "null_mean"),
		nullLow: r(n, "null_low"),
		nullHigh: r(n, "null_high"),
		aside: typeof n.p == "number" ? `p ${H(n.p)}` : "",
		strong: e.highlights.includes(String(n.part)),
		link: t?.(String(n.part))
	}));
	return /* @__PURE__ */ J(y, { children: [/* @__PURE__ */ J(dt, {
		bars: i,
		unit: n?.unit ?? "",
		label: `Parts by ${U(e.main)}`
	}), e.measured > i.length && /* @__PURE__ */ J("p", {
		class: "note",
		children: [
			"The ",
			i.length,
			" largest of ",
			e.measured.toLocaleString("en"),
			" parts, either sign."
		]
	})] });
}
function Cn(e) {
	return (t) => typeof t.part == "string" ? e?.(t.part) : void 0;
}
function wn({ doc: e }) {
	let t = e.tables.tokens?.rows ?? [], n = e.labels.position, r = e.variables.filter((e) => e.axes.join() === "position" && e.data !== null && e.name !== "token_id"), [i, a] = I(""), o = r.find((e) => e.name === i) ?? r[0];
	return !t.length || !n || !o || e.main === o.name ? null : /* @__PURE__ */ J(Y, {
		title: "Tokens",
		aside: r.length > 1 && /* @__PURE__ */ J("label", {
			class: "pick",
			children: [/* @__PURE__ */ J("span", { children: "Shown" }), /* @__PURE__ */ J("select", {
				value: o.name,
				onChange: (e) => a(e.currentTarget.value),
				children: r.map((e) => /* @__PURE__ */ J("option", {
					value: e.name,
					children: U(e.name)
				}))
			})]
		}),
		children: /* @__PURE__ */ J(Ut, {
			tokens: (e.steps.position ?? []).map((e) => Tn(String(e))),
			values: B(o) ?? void 0,
			unit: o.unit,
			label: U(o.name),
			legend: !0
		})
	});
}
function Tn(e) {
	return /^-?\d+ (['"])(.*)\1$/s.exec(e)?.[2] ?? e;
}
function En({ doc: e }) {
	let t = e.variables.filter((e) => e.axes.length === 0), n = (e) => {
		let n = t.find((t) => t.name === e);
		return n ? B(n)?.[0] ?? NaN : NaN;
	}, r = new Set(t.map((e) => e.name).filter((e) => /_(low|high)$/.test(e) && !Number.isNaN(n(e.replace(/_(low|high)$/, "")))));
	e.variables[0]?.axes.length === 0 && ["low", "high"].forEach((e) => r.add(e));
	let i = t.filter((e) => !r.has(e.name) && !Number.isNaN(n(e.name)));
	return i.length ? /* @__PURE__ */ J(Y, {
		title: e.variables[0]?.axes.length === 0 ? "Measured" : "Single numbers",
		children: /* @__PURE__ */ J("dl", {
			class: "tiles",
			children: i.map((t) => {
				let r = t.name === e.main && !Number.isNaN(n("low")) ? "" : `${t.name}_`, [i, a] = [n(`${r}low`), n(`${r}high`)];
				return /* @__PURE__ */ J("div", {
					class: t.name === e.main ? "tile main" : "tile",
					children: [/* @__PURE__ */ J("dt", { children: U(t.name) }), /* @__PURE__ */ J("dd", { children: [
						/* @__PURE__ */ J("b", {
							class: "num",
							children: H(n(t.name))
						}),
						" ",
						/* @__PURE__ */ J("span", { children: t.unit }),
						!Number.isNaN(i) && /* @__PURE__ */ J("small", {
							class: "num",
							children: [
								"95 % ",
								H(i),
								" to ",
								H(a)
							]
						})
					] })]
				});
			})
		})
	}) : null;
}
function Dn({ doc: e, link: t }) {
	let n = new Set(e.sections.map((e) => e.name)), r = Object.entries(e.tables).filter(([e]) => !n.has(e) && e !== "cells" && e !== "tokens" && e !== "names");
	return !r.length && !e.rows.length ? null : /* @__PURE__ */ J(Y, {
		title: "Numbers",
		children: [e.rows.length > 0 && /* @__PURE__ */ J(Lt, {
			rows: e.rows,
			n: e.measured,
			title: "parts, largest first",
			link: Cn(t)
		}), r.map(([e, t]) => /* @__PURE__ */ J(Lt, {
			rows: t.rows,
			n: t.n,
			title: U(e)
		}))]
	});
}
function On({ provenance: e, python: t }) {
	return /* @__PURE__ */ J(Y, {
		title: "Where the numbers came from",
		class: "whence",
		children: [t && /* @__PURE__ */ J("div", {
			class: "call",
			children: [/* @__PURE__ */ J("pre", {
				tabIndex: 0,
				"aria-label": "Python that makes it again",
				children: /* @__PURE__ */ J("code", { children: t })
			}), /* @__PURE__ */ J(tt, {
				text: () => t,
				label: "Copy Python"
			})]
		}), e.length ? /* @__PURE__ */ J("details", { children: [/* @__PURE__ */ J("summary", { children: [e.length, " facts of the record"] }), /* @__PURE__ */ J("dl", {
			class: "facts",
			children: e.map(([e, t]) => /* @__PURE__ */ J(y, { children: [/* @__PURE__ */ J("dt", { children: e }), /* @__PURE__ */ J("dd", { children: t })] }))
		})] }) : /* @__PURE__ */ J("p", {
			class: "note",
			children: "Made by hand: no record."
		})]
	});
}
function kn(e) {
	return e.method ? W(e.method) : e.kind === "knob" ? e.name : "Result";
}
// src/results.tsx
function An({ changed: e, folder: t }) {
	let { got: n, failed: r, busy: i } = q("/api/results", e), [a, o] = I(""), s = z(() => {
		let e = a.toLowerCase().split(/\s+/).filter(Boolean);
		return (n ?? []).filter((t) => e.every((e) => `${t.name} ${t.method} ${t.model} ${t.about}`.toLowerCase().includes(e)));
	}, [n, a]);
	return /* @__PURE__ */ J(y, { children: [
		/* @__PURE__ */ J($, {
			title: "Results",
			lead: t ? `Folders of ${t}; the command line and the library read and write the same ones.` : ""
		}),
		r && /* @__PURE__ */ J(Z, { message: r }),
		n && n.length > 6 && /* @__PURE__ */ J("label", {
			class: "search",
			children: [/* @__PURE__ */ J("span", {
				class: "hidden",
				children: "Search results"
			}), /* @__PURE__ */ J("input", {
				type: "search",
				placeholder: "Search by name, method, model or task",
				value: a,
				onInput: (e) => o(e.currentTarget.value)
			})]
		}),
		n && !n.length && /* @__PURE__ */ J(X, {
			title: "No results here yet",
			children: /* @__PURE__ */ J("p", { children: [
				"Run a method on ",
				/* @__PURE__ */ J("a", {
					href: "#/find",
					children: "Find"
				}),
				", ",
				/* @__PURE__ */ J("a", {
					href: "#/prove",
					children: "Prove"
				}),
				" or ",
				/* @__PURE__ */ J("a", {
					href: "#/turn",
					children: "Turn"
				}),
				", or save one from Python: ",
				/* @__PURE__ */ J("code", { children: [
					"result.save(\"",
					t || "FOLDER",
					"/name\")"
				] })
			] })
		}),
		i && !n && /* @__PURE__ */ J("div", {
			class: "waiting",
			"aria-busy": "true",
			children: "Reading the folder …"
		}),
		/* @__PURE__ */ J("ul", {
			class: "entries",
			children: s.map((e) => /* @__PURE__ */ J("li", {
				class: e.kind,
				children: /* @__PURE__ */ J("a", {
					href: `#/results/${qe(e.name)}`,
					children: [
						/* @__PURE__ */ J("b", { children: e.name }),
						/* @__PURE__ */ J("span", {
							class: "entry-method",
							children: [e.kind === "damaged" ? "Damaged" : e.method ? W(e.method) : "Made by hand", e.kind === "knob" ? ", a knob" : ""]
						}),
						/* @__PURE__ */ J("span", {
							class: "entry-about",
							children: e.kind === "damaged" ? e.message : [e.model, e.about].filter(Boolean).join(" · ")
						}),
						/* @__PURE__ */ J("time", { children: e.date.replace("T", " ").slice(0, 16) })
					]
				})
			}))
		}),
		n && n.length > 0 && !s.length && /* @__PURE__ */ J(X, { title: `Nothing here matches “${a}”` })
	] });
}
function jn({ name: e, changed: t }) {
	let { got: n, failed: r, busy: i } = q(`/api/result?name=${encodeURIComponent(e)}`, t), a = z(() => Je(e), [e]), o = (t) => `/api/figure?name=${encodeURIComponent(e)}&format=${t}`;
	return /* @__PURE__ */ J(y, { children: [
		/* @__PURE__ */ J($, {
			title: n ? kn(n) : e,
			back: {
				to: "#/results",
				text: "Results"
			},
			lead: n ? Pn(n) : "",
			children: n && /* @__PURE__ */ J("div", {
				class: "exports",
				children: [
					/* @__PURE__ */ J("span", {
						class: "folder",
						children: /* @__PURE__ */ J("code", { children: e })
					}),
					n.kind === "result" && /* @__PURE__ */ J(y, { children: [
						/* @__PURE__ */ J("a", {
							href: o("svg"),
							download: `${e}.svg`,
							children: "SVG"
						}),
						/* @__PURE__ */ J("a", {
							href: o("png"),
							download: `${e}.png`,
							children: "PNG"
						}),
						/* @__PURE__ */ J("a", {
							href: o("pdf"),
							download: `${e}.pdf`,
							children: "PDF"
						})
					] }),
					n.kind === "result" && /* @__PURE__ */ J("a", {
						href: `#/compare?${new URLSearchParams({ a: e })}`,
						children: "Compare"
					}),
					/* @__PURE__ */ J("a", {
						href: `/api/saved?name=${encodeURIComponent(e)}`,
						download: `${e}.html`,
						children: "One file"
					})
				]
			})
		}),
		r && /* @__PURE__ */ J(Z, {
			message: r,
			children: /* @__PURE__ */ J("p", { children: ["The other results are not touched by it. ", /* @__PURE__ */ J("a", {
				href: "#/results",
				children: "To the results"
			})] })
		}),
		i && !n && /* @__PURE__ */ J("div", {
			class: "waiting",
			"aria-busy": "true",
			children: [
				"Reading ",
				e,
				" …"
			]
		}),
		n && /* @__PURE__ */ J(tn, {
			doc: n,
			slices: a,
			link: (e) => /^L\d+(\.|$)/.test(e) && !e.includes(">") ? `#/model/${e}` : void 0
		}, e)
	] });
}
function Mn({ query: e, changed: t }) {
	let { got: n, failed: r } = q("/api/results", t), [i, a] = [e.get("a") ?? "", e.get("b") ?? ""], o = i && a && i !== a, s = q(o ? `/api/difference?${new URLSearchParams({
		a: i,
		b: a
	})}` : null), c = (n ?? []).filter((e) => e.kind === "result"), l = (e, t) => {
		let n = new URLSearchParams({
			a: i,
			b: a
		});
		n.set(e, t), Pr(`compare?${n}`);
	}, u = (e, t, n) => /* @__PURE__ */ J("label", {
		class: "pick",
		children: [/* @__PURE__ */ J("span", { children: n }), /* @__PURE__ */ J("select", {
			value: t,
			onChange: (t) => l(e, t.currentTarget.value),
			children: [/* @__PURE__ */ J("option", {
				value: "",
				children: "choose a Result"
			}), c.map((e) => /* @__PURE__ */ J("option", {
				value: e.name,
				children: [e.name, e.method ? ` (${W(e.method)})` : ""]
			}))]
		})]
	});
	return /* @__PURE__ */ J(y, { children: [
		/* @__PURE__ */ J($, {
			title: "Compare",
			back: {
				to: "#/results",
				text: "Results"
			},
			lead: "Two Results side by side, and the one less the other where they have the same axes."
		}),
		r && /* @__PURE__ */ J(Z, { message: r }),
		n && c.length < 2 && /* @__PURE__ */ J(X, {
			title: "Two Results are needed",
			children: /* @__PURE__ */ J("p", { children: [
				"This folder has ",
				c.length,
				". Run a method on ",
				/* @__PURE__ */ J("a", {
					href: "#/find",
					children: "Find"
				}),
				" or ",
				/* @__PURE__ */ J("a", {
					href: "#/prove",
					children: "Prove"
				}),
				"."
			] })
		}),
		/* @__PURE__ */ J("div", {
			class: "choose",
			children: [u("a", i, "Left"), u("b", a, "Right")]
		}),
		o && /* @__PURE__ */ J(Y, {
			title: "Left less right",
			children: s.failed ? /* @__PURE__ */ J("p", {
				class: "note",
				children: s.failed
			}) : s.got?.kind === "result" ? /* @__PURE__ */ J("div", {
				class: "nested",
				children: [/* @__PURE__ */ J(sn, {
					doc: s.got,
					slices: void 0,
					link: void 0
				}), /* @__PURE__ */ J("ul", {
					class: "notes",
					children: s.got.notes.map((e) => /* @__PURE__ */ J("li", { children: e }))
				})]
			}) : /* @__PURE__ */ J("div", {
				class: "waiting",
				"aria-busy": "true",
				children: "Reading both …"
			})
		}),
		o && /* @__PURE__ */ J("div", {
			class: "beside",
			children: [i, a].map((e) => /* @__PURE__ */ J(Nn, {
				name: e,
				changed: t
			}, e))
		})
	] });
}
function Nn({ name: e, changed: t }) {
	let { got: n, failed: r } = q(`/api/result?name=${encodeURIComponent(e)}`, t), i = z(() => Je(e), [e]);
	return r ? /* @__PURE__ */ J(Z, { message: r }) : n ? /* @__PURE__ */ J("section", { children: [
		/* @__PURE__ */ J("h2", {
			class: "beside-name",
			children: /* @__PURE__ */ J("a", {
				href: `#/results/${qe(e)}`,
				children: e
			})
		}),
		/* @__PURE__ */ J("p", {
			class: "note",
			children: [
				kn(n),
				"; ",
				Pn(n)
			]
		}),
		n.kind === "result" ? /* @__PURE__ */ J(sn, {
			doc: n,
			slices: i,
			link: void 0
		}) : /* @__PURE__ */ J("p", {
			class: "note",
			children: "A knob has no figure."
		})
	] }) : /* @__PURE__ */ J("div", {
		class: "waiting",
		"aria-busy": "true",
		children: [
			"Reading ",
			e,
			" …"
		]
	});
}
function Pn(e) {
	if (e.kind === "knob") return e.origin;
	let t = e.provenance.find(([e]) => e === "model source")?.[1];
	return [
		e.asked,
		t,
		e.measured > 1 ? `${e.measured.toLocaleString("en")} values` : ""
	].filter(Boolean).join(" · ");
}
function $(e) {
	return /* @__PURE__ */ J("div", {
		class: "page-head",
		children: [
			e.back && /* @__PURE__ */ J("a", {
				class: "back",
				href: e.back.to,
				children: ["← ", e.back.text]
			}),
			/* @__PURE__ */ J("h1", { children: e.title }),
			e.lead && /* @__PURE__ */ J("p", {
				class: "lead-line",
				children: e.lead
			}),
			e.children
		]
	});
}
// src/features.tsx
var Fn = "The capital of Lolavia is Grerum. Emma asked Kate about the violin. The capital of Lolavia is";
function In({ part: e, query: t, state: n }) {
	let r = n?.model.state, { got: i, failed: a } = K(r === "ready" ? { what: "dictionaries" } : null), [o, s] = I(t.get("text") ?? Fn), [c, l] = I(o), u = t.get("place") ?? e.replace(/\.F\d+$/, ""), d = /* @__PURE__ */ J($, {
		title: "Features",
		lead: "What a sparse dictionary finds in the model's signals, as parts that can be looked at, patched and turned."
	});
	if (r === "none") return /* @__PURE__ */ J(y, { children: [d, /* @__PURE__ */ J(X, {
		title: "No model is open",
		children: /* @__PURE__ */ J("p", { children: [
			"Start ",
			/* @__PURE__ */ J("code", { children: "patchbay ui MODEL --dictionary FOLDER" }),
			"."
		] })
	})] });
	if (r === "failed") return /* @__PURE__ */ J(y, { children: [d, /* @__PURE__ */ J(Z, { message: n?.model.message ?? "" })] });
	if (a) return /* @__PURE__ */ J(y, { children: [d, /* @__PURE__ */ J(Z, { message: a })] });
	if (!i) return /* @__PURE__ */ J(y, { children: [d, /* @__PURE__ */ J("div", {
		class: "waiting",
		"aria-busy": "true",
		children: r === "ready" ? "Reading the dictionaries …" : "The model is loading …"
	})] });
	if (!i.dictionaries.length) return /* @__PURE__ */ J(y, { children: [d, /* @__PURE__ */ J(X, {
		title: "No dictionary is attached",
		children: /* @__PURE__ */ J("p", { children: [
			"Start ",
			/* @__PURE__ */ J("code", { children: [
				"patchbay ui ",
				n?.model.source,
				" --dictionary FOLDER"
			] }),
			" with one that SAELens, sparsify or Patchbay wrote; ",
			/* @__PURE__ */ J("a", {
				href: "#/train/dictionary",
				children: "Train"
			}),
			" makes one."
		] })
	})] });
	let f = i.dictionaries.find((e) => e.place === u) ?? i.dictionaries[0];
	return /* @__PURE__ */ J(y, { children: [
		d,
		/* @__PURE__ */ J(Y, {
			title: `${f.n.toLocaleString("en")} features of ${f.writes} in layer ${f.place.replace(/^L(\d+).*/, "$1")}`,
			aside: i.dictionaries.length > 1 && /* @__PURE__ */ J("label", {
				class: "pick",
				children: [/* @__PURE__ */ J("span", { children: "dictionary" }), /* @__PURE__ */ J("select", {
					value: f.place,
					onChange: (e) => Pr(`features?place=${e.currentTarget.value}`),
					children: i.dictionaries.map((e) => /* @__PURE__ */ J("option", {
						value: e.place,
						children: [
							e.place,
							" (",
							e.n,
							")"
						]
					}))
				})]
			}),
			children: [/* @__PURE__ */ J("form", {
				class: "feature-ask",
				onSubmit: (e) => {
					e.preventDefault(), l(o);
				},
				children: [
					/* @__PURE__ */ J("label", {
						class: "hidden",
						for: "feature-text",
						children: "Texts, one to a line"
					}),
					/* @__PURE__ */ J("textarea", {
						id: "feature-text",
						rows: 3,
						value: o,
						onInput: (e) => s(e.currentTarget.value),
						placeholder: "Texts, one to a line: the first is shown token by token, all of them are searched for contexts"
					}),
					/* @__PURE__ */ J("div", {
						class: "form-foot",
						children: [/* @__PURE__ */ J("button", {
							type: "submit",
							class: "primary",
							disabled: !o.trim(),
							children: "Read"
						}), /* @__PURE__ */ J(Rn, {
							place: f.place,
							n: f.n
						})]
					})
				]
			}), /* @__PURE__ */ J("p", {
				class: "note",
				children: /* @__PURE__ */ J(nt, { text: [f.source, ...f.notes].filter(Boolean).join("; ") })
			})]
		}),
		c.trim() && /* @__PURE__ */ J(zn, {
			text: Ln(c)[0],
			place: f.place,
			part: e
		}),
		e && /* @__PURE__ */ J(Bn, {
			part: e,
			texts: Ln(c)
		})
	] });
}
function Ln(e) {
	return e.split("\n").filter((e) => e.trim()).slice(0, 64);
}
function Rn({ place: e, n: t }) {
	let [n, r] = I(""), i = () => /^\d+$/.test(n) && Number(n) < t && Pr(`features/${e}.F${n}`);
	return /* @__PURE__ */ J("span", {
		class: "jump",
		children: [
			/* @__PURE__ */ J("label", {
				for: "jump",
				children: "Feature"
			}),
			/* @__PURE__ */ J("input", {
				id: "jump",
				type: "text",
				inputMode: "numeric",
				value: n,
				placeholder: `0 to ${t - 1}`,
				onInput: (e) => r(e.currentTarget.value),
				onKeyDown: (e) => {
					e.key === "Enter" && (e.preventDefault(), i());
				}
			}),
			/* @__PURE__ */ J("button", {
				type: "button",
				class: "quiet",
				disabled: !/^\d+$/.test(n) || Number(n) >= t,
				onClick: i,
				children: "Open"
			})
		]
	});
}
function zn({ text: e, place: t, part: n }) {
	let { got: r, failed: i } = K({
		what: "active",
		text: e,
		place: t,
		...n ? { part: n } : {}
	}), [a, o] = I("");
	if (L(() => o(""), [n, e]), i) return /* @__PURE__ */ J(Z, { message: i });
	if (!r) return /* @__PURE__ */ J("div", {
		class: "waiting",
		"aria-busy": "true",
		children: "Reading the text …"
	});
	let s = r.rows.find((e) => e.feature === (a || n)) ?? r.rows[0], c = r.active.reduce((e, t) => e + t, 0) / Math.max(1, r.active.length), l = r.rows[0]?.most ?? 1;
	return /* @__PURE__ */ J(Y, {
		title: "On this text",
		aside: /* @__PURE__ */ J("span", {
			class: "note num",
			children: [
				H(Math.round(c * 10) / 10),
				" of ",
				r.n,
				" active at a token"
			]
		}),
		children: s ? /* @__PURE__ */ J(y, { children: [
			/* @__PURE__ */ J(Ut, {
				tokens: r.tokens,
				values: s.values,
				unit: "activation",
				label: `Activation of ${s.feature}`,
				legend: !0
			}),
			/* @__PURE__ */ J("p", {
				class: "note",
				children: [
					s.feature,
					", highest ",
					H(s.most)
				]
			}),
			/* @__PURE__ */ J("ol", {
				class: "actives",
				children: r.rows.map((e) => /* @__PURE__ */ J("li", { children: /* @__PURE__ */ J("a", {
					href: `#/features/${e.feature}`,
					"aria-current": e.feature === n ? "true" : void 0,
					onPointerEnter: () => o(e.feature),
					onPointerLeave: () => o(""),
					onFocus: () => o(e.feature),
					onBlur: () => o(""),
					children: [
						/* @__PURE__ */ J("code", { children: e.feature }),
						/* @__PURE__ */ J("span", {
							class: "next-bar",
							children: /* @__PURE__ */ J("i", { style: { width: `${100 * e.most / l}%` } })
						}),
						/* @__PURE__ */ J("span", {
							class: "num",
							children: H(e.most)
						})
					]
				}) }))
			})
		] }) : /* @__PURE__ */ J("p", {
			class: "note",
			children: "No feature is active on it."
		})
	});
}
function Bn({ part: e, texts: t }) {
	let { got: n, failed: r } = K({
		what: "feature",
		part: e,
		texts: t
	}), i = new URLSearchParams({
		given: JSON.stringify({
			parts: e,
			strength: "0"
		}),
		name: e.replace(/\./g, "-").toLowerCase()
	});
	return /* @__PURE__ */ J(Y, {
		title: n?.title ?? e,
		id: "part",
		aside: /* @__PURE__ */ J("a", {
			class: "quiet",
			href: `#/turn/scale?${i}`,
			children: "Make a knob of it"
		}),
		children: [
			r && /* @__PURE__ */ J(Z, { message: r }),
			!n && !r && /* @__PURE__ */ J("div", {
				class: "waiting",
				"aria-busy": "true",
				children: [
					"Reading ",
					e,
					" …"
				]
			}),
			n?.sections.map((e) => /* @__PURE__ */ J(Lt, {
				title: e.title,
				rows: e.rows,
				open: !0
			}))
		]
	});
}
// src/knobs.tsx
var Vn = "The capital of Lolavia is Grerum. Emma asked Kate about the violin. The capital of Lolavia is", Hn = 24;
function Un(e) {
	return Object.fromEntries((e.get("knobs") ?? "").split("+").filter(Boolean).map((e) => {
		let t = e.lastIndexOf("@");
		return [e.slice(0, t), Number(e.slice(t + 1))];
	}).filter(([e, t]) => e && Number.isFinite(t)));
}
function Wn({ query: e, state: t }) {
	let n = q("/api/results", t?.results ?? 0), r = t?.model.state, i = z(() => (n.got ?? []).filter((e) => e.kind === "knob").map((e) => e.name).slice(0, 64), [n.got]), a = K(r === "ready" && i.length ? {
		what: "knobs",
		names: i
	} : null), [o, s] = I(e.get("text") ?? Vn), [c, l] = I(() => Un(e)), u = R(0);
	L(() => (clearTimeout(u.current), u.current = window.setTimeout(() => {
		let e = Object.entries(c).map(([e, t]) => `${e}@${Number(t.toFixed(4))}`).join("+");
		history.replaceState(null, "", `#/knobs?${new URLSearchParams({
			text: o,
			...e ? { knobs: e } : {}
		})}`);
	}, 250), () => clearTimeout(u.current)), [o, c]);
	let d = /* @__PURE__ */ J($, {
		title: "Knobs",
		lead: "Turn a knob and see what it does to a text, as it turns."
	});
	if (r === "none") return /* @__PURE__ */ J(y, { children: [d, /* @__PURE__ */ J(X, {
		title: "No model is open",
		children: /* @__PURE__ */ J("p", { children: [
			"Start ",
			/* @__PURE__ */ J("code", { children: "patchbay ui MODEL" }),
			", such as ",
			/* @__PURE__ */ J("code", { children: "patchbay ui tiny" }),
			"."
		] })
	})] });
	if (r === "failed") return /* @__PURE__ */ J(y, { children: [d, /* @__PURE__ */ J(Z, { message: t?.model.message ?? "" })] });
	if (n.failed) return /* @__PURE__ */ J(y, { children: [d, /* @__PURE__ */ J(Z, { message: n.failed })] });
	if (n.got && !i.length) return /* @__PURE__ */ J(y, { children: [d, /* @__PURE__ */ J(X, {
		title: "No knobs here yet",
		children: /* @__PURE__ */ J("p", { children: [
			"Make one on ",
			/* @__PURE__ */ J("a", {
				href: "#/turn",
				children: "Turn"
			}),
			": ",
			/* @__PURE__ */ J("a", {
				href: `#/turn/scale?${new URLSearchParams({
					given: JSON.stringify({
						parts: "L1.H1",
						strength: "0"
					}),
					name: "head-off"
				})}`,
				children: "turn one head off"
			}),
			" is the shortest. A ",
			/* @__PURE__ */ J("code", { children: ".knob" }),
			" file that is copied into ",
			/* @__PURE__ */ J("code", { children: "results" }),
			" is here too."
		] })
	})] });
	let f = a.got?.knobs ?? [], p = f.filter((e) => !e.message), m = p.map((e) => ({
		name: e.name,
		strength: c[e.name] ?? e.neutral
	}));
	return /* @__PURE__ */ J(y, { children: [
		d,
		a.failed && /* @__PURE__ */ J(Z, { message: a.failed }),
		/* @__PURE__ */ J("div", {
			class: "turn-page",
			children: [/* @__PURE__ */ J(Y, {
				title: `${f.length || i.length} knob${i.length === 1 ? "" : "s"}`,
				aside: /* @__PURE__ */ J("button", {
					type: "button",
					class: "quiet",
					disabled: !m.some((e) => e.strength !== p.find((t) => t.name === e.name)?.neutral),
					onClick: () => l({}),
					children: "All neutral"
				}),
				children: [!a.got && !a.failed && /* @__PURE__ */ J("div", {
					class: "waiting",
					"aria-busy": "true",
					children: r === "loading" ? "The model is loading …" : "Reading the knobs …"
				}), f.map((e) => /* @__PURE__ */ J(Gn, {
					knob: e,
					value: c[e.name] ?? e.neutral,
					turn: (t) => l((n) => ({
						...n,
						[e.name]: t
					}))
				}, e.name))]
			}), /* @__PURE__ */ J("div", {
				class: "turn-side",
				children: [/* @__PURE__ */ J(Y, { children: [/* @__PURE__ */ J("label", {
					class: "turn-label",
					for: "turn-text",
					children: "Prompt"
				}), /* @__PURE__ */ J("textarea", {
					id: "turn-text",
					rows: 3,
					value: o,
					onInput: (e) => s(e.currentTarget.value)
				})] }), o && a.got && /* @__PURE__ */ J(qn, {
					text: o,
					given: m,
					neutral: p.every((e) => (c[e.name] ?? e.neutral) === e.neutral)
				})]
			})]
		})
	] });
}
function Gn({ knob: e, value: t, turn: n }) {
	let r = `knob-${e.name}`, [i, a] = I("");
	if (e.message) return /* @__PURE__ */ J("div", {
		class: "slider",
		children: [/* @__PURE__ */ J("b", { children: e.name }), /* @__PURE__ */ J("p", {
			class: "failed",
			role: "alert",
			children: e.message
		})]
	});
	let o = (e.high - e.low) / 200, s = e.high - e.low, c = (t) => `${100 * (t - e.low) / s}%`;
	return /* @__PURE__ */ J("div", {
		class: `slider ${t === e.neutral ? "" : "turned"}`,
		children: [
			/* @__PURE__ */ J("div", {
				class: "slider-head",
				children: [/* @__PURE__ */ J("label", {
					for: r,
					children: e.name.replace(/\.knob$/, "")
				}), /* @__PURE__ */ J("input", {
					class: "num",
					type: "number",
					step: "any",
					value: Number(t.toFixed(3)),
					"aria-label": `Strength of ${e.name}`,
					onChange: (e) => Number.isFinite(e.currentTarget.valueAsNumber) && n(e.currentTarget.valueAsNumber)
				})]
			}),
			/* @__PURE__ */ J("input", {
				id: r,
				type: "range",
				min: Math.min(e.low, t),
				max: Math.max(e.high, t),
				step: o,
				value: t,
				"aria-valuetext": `${H(t)}${t === e.neutral ? ", neutral" : ""}`,
				onInput: (t) => n(Kn(Number(t.currentTarget.value), e, o))
			}),
			/* @__PURE__ */ J("div", {
				class: "slider-marks num",
				"aria-hidden": "true",
				children: [/* @__PURE__ */ J("span", {
					style: { left: c(e.neutral) },
					children: [H(e.neutral), " neutral"]
				}), e.strength !== e.neutral && Math.abs(e.strength - e.neutral) > .24 * s && /* @__PURE__ */ J("span", {
					style: { left: c(e.strength) },
					children: [H(e.strength), " saved"]
				})]
			}),
			/* @__PURE__ */ J("div", {
				class: "slider-foot",
				children: [/* @__PURE__ */ J("code", {
					title: e.edits.join("\n"),
					children: [e.edits[0], e.n_edits > 1 ? ` and ${e.n_edits - 1} more` : ""]
				}), /* @__PURE__ */ J("span", {
					class: "slider-does",
					children: [
						/* @__PURE__ */ J("button", {
							type: "button",
							class: "quiet",
							disabled: t === e.neutral,
							onClick: () => n(e.neutral),
							children: "Neutral"
						}),
						/* @__PURE__ */ J("button", {
							type: "button",
							class: "quiet",
							disabled: t === e.strength,
							onClick: () => Ge("/api/knob", {
								name: e.name,
								strength: t,
								saved: ""
							}).then((e) => a(`saved as ${e.name}`), (e) => a(e.message)),
							children: "Save here"
						}),
						/* @__PURE__ */ J("a", {
							class: "quiet",
							href: `#/results/${qe(e.name)}`,
							children: "Evidence"
						}),
						/* @__PURE__ */ J("button", {
							type: "button",
							class: "quiet",
							onClick: () => Pr(`measure/dose_response?${new URLSearchParams({ given: JSON.stringify({ knob: e.name }) })}`),
							children: "Dose-response"
						})
					]
				})]
			}),
			i && /* @__PURE__ */ J("p", {
				class: "note",
				role: "status",
				children: i
			})
		]
	});
}
function Kn(e, t, n) {
	return Math.abs(e - t.neutral) < 1.5 * n ? t.neutral : Number(e.toFixed(6));
}
function qn({ text: e, given: t, neutral: n }) {
	let r = K({
		what: "turned",
		text: e,
		knobs: t
	}), i = R(null);
	r.got && (i.current = r.got);
	let a = r.got ?? i.current, [o, s] = I({
		text: e,
		given: t
	});
	return L(() => {
		let n = window.setTimeout(() => s({
			text: e,
			given: t
		}), 400);
		return () => clearTimeout(n);
	}, [JSON.stringify([e, t])]), /* @__PURE__ */ J(y, { children: [/* @__PURE__ */ J(Y, {
		title: "What comes next",
		aside: a && /* @__PURE__ */ J("span", {
			class: "note num",
			children: [
				"KL ",
				H(a.kl),
				" nats"
			]
		}),
		children: [
			r.failed && /* @__PURE__ */ J(Z, { message: r.failed }),
			!a && !r.failed && /* @__PURE__ */ J("div", {
				class: "waiting",
				"aria-busy": "true",
				children: "The model is reading …"
			}),
			a && /* @__PURE__ */ J(Jn, {
				rows: a.next,
				before: "without",
				after: n ? "all neutral" : "with the knobs"
			}),
			a?.notes.map((e) => /* @__PURE__ */ J("p", {
				class: "note",
				children: e
			}))
		]
	}), /* @__PURE__ */ J(Yn, { ...o }, JSON.stringify(o))] });
}
function Jn({ rows: e, before: t, after: n }) {
	return /* @__PURE__ */ J(y, { children: [/* @__PURE__ */ J("ol", {
		class: "nexts",
		children: e.map((e) => /* @__PURE__ */ J("li", { children: [
			/* @__PURE__ */ J("code", { children: G(e.token) }),
			/* @__PURE__ */ J("span", {
				class: "nexts-bars",
				children: [/* @__PURE__ */ J("i", {
					class: "was",
					style: { width: `${100 * e.before}%` }
				}), /* @__PURE__ */ J("i", {
					class: "is",
					style: { width: `${100 * e.after}%` }
				})]
			}),
			/* @__PURE__ */ J("span", {
				class: "num",
				children: H(e.before)
			}),
			/* @__PURE__ */ J("span", {
				class: "num strong",
				children: H(e.after)
			})
		] }))
	}), /* @__PURE__ */ J("p", {
		class: "key",
		children: [/* @__PURE__ */ J("span", { children: [/* @__PURE__ */ J("i", { class: "key-was" }), t] }), /* @__PURE__ */ J("span", { children: [/* @__PURE__ */ J("i", { class: "key-is" }), n] })]
	})] });
}
function Yn({ text: e, given: t }) {
	let [n, r] = I({
		before: [],
		after: []
	}), { got: i, failed: a } = K({
		what: "turned",
		text: e,
		knobs: t,
		new: Hn
	}, (e) => r((t) => ({
		...t,
		[e.side]: [...t[e.side], e.token]
	}))), o = n.before.findIndex((e, t) => n.after[t] !== e), s = (e, t) => /* @__PURE__ */ J("div", { children: [/* @__PURE__ */ J("h3", { children: t }), /* @__PURE__ */ J("p", {
		class: "text",
		"aria-live": "polite",
		children: [
			n[e].map((t, n) => /* @__PURE__ */ J("span", {
				class: e === "after" && o >= 0 && n >= o ? "differs" : "",
				children: t
			})),
			!i && !a && /* @__PURE__ */ J("span", {
				class: "caret",
				"aria-hidden": "true"
			}),
			i && !n[e].length && /* @__PURE__ */ J("span", {
				class: "note",
				children: i[e] || "The model ends the text here."
			})
		]
	})] });
	return /* @__PURE__ */ J(Y, {
		title: "How the text goes on",
		aside: /* @__PURE__ */ J("span", {
			class: "note",
			children: [
				"greedy, up to ",
				Hn,
				" tokens"
			]
		}),
		children: [a ? /* @__PURE__ */ J(Z, { message: a }) : /* @__PURE__ */ J("div", {
			class: "sides",
			children: [s("before", "Without"), s("after", "With the knobs")]
		}), i && /* @__PURE__ */ J(tt, {
			label: "Copy both",
			text: () => `without: ${e}${i.before ?? ""}\nwith: ${e}${i.after ?? ""}\n`
		})]
	});
}
// src/runs.tsx
var Xn = {
	queued: "waits",
	running: "running",
	stopping: "stopping",
	done: "done",
	failed: "failed",
	cancelled: "cancelled"
};
function Zn({ runs: e }) {
	return /* @__PURE__ */ J(y, { children: [
		/* @__PURE__ */ J($, {
			title: "Runs",
			lead: "One at a time, in their order. What a cancelled sweep had finished is kept: the same call goes on from there."
		}),
		e && !e.length && /* @__PURE__ */ J(X, {
			title: "Nothing has run since the server started",
			children: /* @__PURE__ */ J("p", { children: [
				"Choose a method on ",
				/* @__PURE__ */ J("a", {
					href: "#/find",
					children: "Find"
				}),
				" or ",
				/* @__PURE__ */ J("a", {
					href: "#/prove",
					children: "Prove"
				}),
				"."
			] })
		}),
		/* @__PURE__ */ J("ul", {
			class: "runs",
			children: [...e ?? []].reverse().map((e) => /* @__PURE__ */ J("li", { children: /* @__PURE__ */ J(Qn, { run: e }) }, e.id))
		})
	] });
}
function Qn({ run: e }) {
	let t = new URLSearchParams({
		given: JSON.stringify(e.given),
		name: e.name
	});
	return /* @__PURE__ */ J("article", {
		class: `run ${e.state}`,
		children: [
			/* @__PURE__ */ J("div", {
				class: "run-head",
				children: [
					/* @__PURE__ */ J("b", { children: W(e.method) }),
					/* @__PURE__ */ J("span", {
						class: `state ${e.state}`,
						children: Xn[e.state]
					}),
					/* @__PURE__ */ J("span", {
						class: "num run-time",
						children: e.seconds > 0 ? rr(e.seconds) : ""
					})
				]
			}),
			["running", "stopping"].includes(e.state) && /* @__PURE__ */ J(er, { run: e }),
			e.message && /* @__PURE__ */ J("p", {
				class: e.state === "failed" ? "failed" : "note",
				role: e.state === "failed" ? "alert" : void 0,
				children: e.message
			}),
			e.drawn > 0 && e.state !== "done" && /* @__PURE__ */ J(tr, { run: e }),
			/* @__PURE__ */ J("details", { children: [/* @__PURE__ */ J("summary", { children: "The call" }), /* @__PURE__ */ J("div", {
				class: "call",
				children: [/* @__PURE__ */ J("pre", {
					tabIndex: 0,
					children: /* @__PURE__ */ J("code", { children: e.command })
				}), /* @__PURE__ */ J(tt, { text: () => e.command })]
			})] }),
			/* @__PURE__ */ J("div", {
				class: "run-foot",
				children: [
					e.result && /* @__PURE__ */ J("a", {
						class: "button",
						href: `#/results/${qe(e.result)}`,
						children: ["Open ", e.result]
					}),
					["running", "queued"].includes(e.state) && /* @__PURE__ */ J("button", {
						type: "button",
						onClick: () => void Ge(`/api/runs/${e.id}/cancel`, {}).catch(() => void 0),
						children: "Cancel"
					}),
					["failed", "cancelled"].includes(e.state) && /* @__PURE__ */ J("a", {
						class: "button",
						href: `#/${e.room}/${e.method}?${t}`,
						children: e.state === "failed" ? "Change and run again" : "Go on"
					})
				]
			})
		]
	});
}
function $n({ run: e, waiting: t }) {
	return /* @__PURE__ */ J("a", {
		class: "run-line",
		href: "#/runs",
		children: [/* @__PURE__ */ J("span", { children: [
			W(e.method),
			": ",
			Xn[e.state],
			e.total ? `, ${e.done.toLocaleString("en")} of ${e.total.toLocaleString("en")}` : "",
			t ? `; ${t} more wait` : ""
		] }), /* @__PURE__ */ J(nr, { run: e })]
	});
}
function er({ run: e }) {
	let t = e.done > 0 && e.total > e.done ? e.seconds * (e.total - e.done) / e.done : null;
	return /* @__PURE__ */ J("div", {
		class: "progress",
		children: [/* @__PURE__ */ J(nr, { run: e }), /* @__PURE__ */ J("span", {
			class: "note num",
			children: [
				e.total ? `${e.done.toLocaleString("en")} of ${e.total.toLocaleString("en")} cells` : "working",
				t !== null && t > 1 ? `, about ${rr(t)} left` : "",
				e.estimate ? ` · ${e.estimate}` : ""
			]
		})]
	});
}
function tr({ run: e }) {
	let { got: t } = q(`/api/partial?id=${e.id}`, e.drawn), n = z(() => Float64Array.from((t?.values ?? []).flat(), (e) => e ?? NaN), [t]);
	if (!t) return null;
	let r = n.reduce((e, t) => e + +!Number.isNaN(t), 0);
	return /* @__PURE__ */ J("div", {
		class: "so-far",
		children: [/* @__PURE__ */ J("p", {
			class: "note num",
			children: [
				r === n.length ? "the sweep, whole" : `${r.toLocaleString("en")} of ${n.length.toLocaleString("en")} cells of the map so far`,
				": mean effect, ",
				t.unit
			]
		}), /* @__PURE__ */ J(bt, {
			values: n,
			rows: t.rows,
			columns: t.columns,
			axes: t.axes,
			unit: t.unit,
			label: `What the sweep of ${W(e.method)} has found so far`,
			upward: !0
		})]
	});
}
function nr({ run: e }) {
	return e.total ? /* @__PURE__ */ J("progress", {
		value: e.done,
		max: e.total,
		"aria-label": `${W(e.method)}: ${Math.round(100 * e.done / e.total)} %`
	}) : /* @__PURE__ */ J("progress", { "aria-label": `${W(e.method)}: working` });
}
function rr(e) {
	return e < 60 ? `${e < 10 ? e.toFixed(1) : Math.round(e)} s` : `${Math.floor(e / 60)} min ${Math.round(e % 60)} s`;
}
// src/method.tsx
function ir({ room: e }) {
	let [t, n] = I(""), r = t.toLowerCase().split(/\s+/).filter(Boolean), i = e.methods.filter((e) => r.every((t) => `${e.name.replace(/_/g, " ")} ${e.doc}`.toLowerCase().includes(t)));
	return /* @__PURE__ */ J(y, { children: [
		/* @__PURE__ */ J($, {
			title: W(e.name),
			lead: e.doc
		}),
		/* @__PURE__ */ J("label", {
			class: "search",
			children: [/* @__PURE__ */ J("span", {
				class: "hidden",
				children: "Search methods"
			}), /* @__PURE__ */ J("input", {
				type: "search",
				placeholder: `Search ${e.methods.length} methods`,
				value: t,
				onInput: (e) => n(e.currentTarget.value)
			})]
		}),
		/* @__PURE__ */ J("ul", {
			class: "methods",
			children: i.map((t) => /* @__PURE__ */ J("li", { children: /* @__PURE__ */ J("a", {
				href: `#/${e.name}/${t.name}`,
				children: [/* @__PURE__ */ J("b", { children: W(t.name) }), /* @__PURE__ */ J("span", { children: t.doc.replace(/^[^:]{0,60}: /, (e) => e.length < 50 ? "" : e) })]
			}) }))
		})
	] });
}
function ar({ room: e, name: t, state: n, about: r, query: i }) {
	let { got: a, failed: o } = q(`/api/method?room=${e}&name=${t}`), s = `patchbay-form-${e}-${t}`, [c, l] = I({}), [u, d] = I(""), [f, p] = I(""), [m, h] = I(!1), [g, _] = I(null);
	L(() => {
		let e = i.get("given") ?? sessionStorage.getItem(s);
		l(e ? JSON.parse(e) : {}), d(i.get("name") ?? ""), p(""), _(null);
	}, [
		e,
		t,
		i.toString()
	]);
	let v = (e, t) => {
		let n = {
			...c,
			[e]: t
		};
		l(n), sessionStorage.setItem(s, JSON.stringify(n));
	}, b = async (n) => {
		n.preventDefault(), p(""), h(!0);
		try {
			_((await Ge("/api/runs", {
				room: e,
				method: t,
				given: c,
				name: u
			})).id);
		} catch (e) {
			p(e.message);
		}
		h(!1);
	};
	if (o) return /* @__PURE__ */ J(Z, {
		message: o,
		children: /* @__PURE__ */ J("p", { children: /* @__PURE__ */ J("a", {
			href: `#/${e}`,
			children: ["All methods of ", e]
		}) })
	});
	if (!a) return /* @__PURE__ */ J("div", {
		class: "waiting",
		"aria-busy": "true",
		children: [
			"Reading ",
			W(t),
			" …"
		]
	});
	let x = n?.runs.find((e) => e.id === g) ?? or(n, e, t), S = n?.model.state === "ready" || n?.model.state === "loading", C = a.fields.filter((e) => e.group === "acts on"), w = a.fields.filter((e) => e.group !== "acts on");
	return /* @__PURE__ */ J(y, { children: [/* @__PURE__ */ J($, {
		title: W(t),
		lead: a.head.replace(/`/g, ""),
		back: {
			to: `#/${e}`,
			text: W(e)
		}
	}), /* @__PURE__ */ J("div", {
		class: "form-page",
		children: [/* @__PURE__ */ J("form", {
			class: "panel form",
			onSubmit: b,
			children: [
				C.map((e) => /* @__PURE__ */ J(sr, {
					field: e,
					value: c[e.name],
					tasks: r.tasks,
					change: v
				})),
				w.length > 0 && /* @__PURE__ */ J("details", {
					open: w.some((e) => e.required || e.name in c),
					children: [/* @__PURE__ */ J("summary", { children: [
						w.length,
						" option",
						w.length === 1 ? "" : "s"
					] }), w.map((e) => /* @__PURE__ */ J(sr, {
						field: e,
						value: c[e.name],
						tasks: r.tasks,
						change: v
					}))]
				}),
				/* @__PURE__ */ J("div", {
					class: "field",
					children: [
						/* @__PURE__ */ J("label", {
							for: "target",
							children: "Save as"
						}),
						/* @__PURE__ */ J("input", {
							id: "target",
							type: "text",
							value: u,
							placeholder: t,
							onInput: (e) => d(e.currentTarget.value),
							"aria-describedby": "target-word"
						}),
						/* @__PURE__ */ J("p", {
							class: "word",
							id: "target-word",
							children: "A folder of the results; without, the method's name and the next free number."
						})
					]
				}),
				f && /* @__PURE__ */ J(Z, { message: f }),
				/* @__PURE__ */ J("div", {
					class: "form-foot",
					children: [/* @__PURE__ */ J("button", {
						type: "submit",
						class: "primary",
						disabled: m || !S,
						children: "Run"
					}), !S && /* @__PURE__ */ J("span", {
						class: "note",
						children: n?.model.state === "failed" ? n.model.message : "Start patchbay ui with a MODEL to run methods."
					})]
				})
			]
		}), /* @__PURE__ */ J("div", {
			class: "form-side",
			children: [x && /* @__PURE__ */ J(Qn, { run: x }), /* @__PURE__ */ J("details", {
				class: "panel help",
				open: !x,
				children: [/* @__PURE__ */ J("summary", { children: "What it measures" }), a.help.split("\n\n").map((e) => e.startsWith("    ") ? /* @__PURE__ */ J("pre", {
					tabIndex: 0,
					children: e.replace(/^ {4}/gm, "")
				}) : /* @__PURE__ */ J("p", { children: /* @__PURE__ */ J(nt, { text: e }) }))]
			})]
		})]
	})] });
}
function or(e, t, n) {
	return [...e?.runs ?? []].reverse().find((e) => e.room === t && e.method === n);
}
function sr({ field: e, value: t, tasks: n, change: r }) {
	let i = `field-${e.name}`, a = `${i}-word`, o = typeof t == "string" ? t : "", s = (t) => r(e.name, t.currentTarget.value), c = e.name === "task" ? "tasks" : void 0;
	return e.kind === "flag" ? /* @__PURE__ */ J("div", {
		class: "field flag",
		children: [/* @__PURE__ */ J("label", { children: [
			/* @__PURE__ */ J("input", {
				type: "checkbox",
				checked: t === void 0 ? e.initial === "true" : !!t,
				onChange: (t) => r(e.name, t.currentTarget.checked),
				"aria-describedby": a
			}),
			" ",
			e.flag
		] }), /* @__PURE__ */ J("p", {
			class: "word",
			id: a,
			children: /* @__PURE__ */ J(nt, { text: e.word })
		})]
	}) : /* @__PURE__ */ J("div", {
		class: "field",
		children: [
			/* @__PURE__ */ J("label", {
				for: i,
				children: [e.flag, e.required && /* @__PURE__ */ J("span", {
					class: "needed",
					children: " needed"
				})]
			}),
			e.kind === "choice" ? /* @__PURE__ */ J("select", {
				id: i,
				value: o || e.initial,
				onChange: s,
				"aria-describedby": a,
				required: e.required,
				children: [!e.initial && /* @__PURE__ */ J("option", {
					value: "",
					children: e.required ? "choose" : "not given"
				}), e.choices.map((e) => /* @__PURE__ */ J("option", {
					value: e,
					children: e
				}))]
			}) : /* @__PURE__ */ J("input", {
				id: i,
				type: "text",
				inputMode: e.kind === "integer" ? "numeric" : e.kind === "number" ? "decimal" : "text",
				value: o,
				placeholder: e.initial || (e.kind === "integer" ? "a whole number" : e.metavar),
				required: e.required,
				list: c,
				onInput: s,
				"aria-describedby": a,
				autocomplete: "off",
				spellcheck: !1
			}),
			c && /* @__PURE__ */ J("datalist", {
				id: "tasks",
				children: n.map((e) => /* @__PURE__ */ J("option", {
					value: e.name,
					children: e.doc
				}))
			}),
			/* @__PURE__ */ J("p", {
				class: "word",
				id: a,
				children: /* @__PURE__ */ J(nt, { text: e.word })
			})
		]
	});
}
// src/model.tsx
function cr({ part: e, state: t }) {
	let n = t?.model.state, r = q(n === "ready" ? "/api/model" : null);
	if (n === "none") return /* @__PURE__ */ J(y, { children: [/* @__PURE__ */ J($, { title: "Model" }), /* @__PURE__ */ J(X, {
		title: "No model is open",
		children: /* @__PURE__ */ J("p", { children: [
			"Start ",
			/* @__PURE__ */ J("code", { children: "patchbay ui MODEL" }),
			", such as ",
			/* @__PURE__ */ J("code", { children: "patchbay ui tiny" }),
			". Results can be read without one."
		] })
	})] });
	if (n === "failed") return /* @__PURE__ */ J(y, { children: [/* @__PURE__ */ J($, { title: "Model" }), /* @__PURE__ */ J(Z, { message: t?.model.message ?? "" })] });
	if (r.failed) return /* @__PURE__ */ J(Z, { message: r.failed });
	if (!r.got) return /* @__PURE__ */ J(y, { children: [/* @__PURE__ */ J($, { title: "Model" }), /* @__PURE__ */ J("div", {
		class: "waiting",
		"aria-busy": "true",
		children: n === "ready" ? "Reading the model …" : "The model is loading …"
	})] });
	let i = r.got;
	return /* @__PURE__ */ J(y, { children: [
		/* @__PURE__ */ J($, {
			title: i.source,
			lead: `${i.family} · ${fr(i.parameters)} parameters · ${i.layers.length} layers · width ${i.d_model} · ${i.vocab.toLocaleString("en")} tokens · ${i.dtype} on ${i.device}`
		}),
		/* @__PURE__ */ J(Y, {
			title: "Patch bay",
			aside: /* @__PURE__ */ J(lr, { check: i.check }),
			children: [/* @__PURE__ */ J("div", {
				class: "bay",
				role: "list",
				"aria-label": "Layers, the last on top",
				children: [...i.layers].reverse().map((t) => /* @__PURE__ */ J(ur, {
					layer: t,
					chosen: e
				}))
			}), /* @__PURE__ */ J("p", {
				class: "note",
				children: ["Choose a jack to see its ports, and what it reads and writes in tokens. ", i.carried.join("; ")]
			})]
		}),
		e && /* @__PURE__ */ J(dr, { part: e })
	] });
}
function lr({ check: e }) {
	return /* @__PURE__ */ J("span", {
		class: e.passed ? "good" : "bad",
		children: [
			e.passed ? "self-check passed" : "self-check FAILED",
			": stream ",
			H(e.stream),
			", logits ",
			H(e.logits),
			", heads ",
			H(e.heads)
		]
	});
}
function ur({ layer: e, chosen: t }) {
	let n = `L${e.layer}`, r = (e, n, r) => /* @__PURE__ */ J("a", {
		class: `jack ${r}`,
		href: `#/model/${e}`,
		"aria-current": t === e ? "true" : void 0,
		title: e,
		children: n
	});
	return /* @__PURE__ */ J("div", {
		class: "bay-row",
		role: "listitem",
		children: [/* @__PURE__ */ J("span", {
			class: "bay-name",
			children: r(n, n, "layer")
		}), /* @__PURE__ */ J("span", {
			class: "bay-parts",
			children: [
				Array.from({ length: e.heads }, (e, t) => r(`${n}.H${t}`, `H${t}`, "head")),
				e.signals.includes("attn.out") && r(`${n}.attn`, "attn", "wide"),
				e.signals.includes("mlp.out") && r(`${n}.mlp`, e.neurons ? `mlp ${e.neurons.toLocaleString("en")}` : "mlp", "wide"),
				Array.from({ length: Math.min(64, e.experts) }, (e, t) => r(`${n}.E${t}`, `E${t}`, "expert"))
			]
		})]
	});
}
function dr({ part: e }) {
	let { got: t, failed: n, busy: r } = q(`/api/part?part=${encodeURIComponent(e)}`);
	return /* @__PURE__ */ J(Y, {
		title: t?.title ?? e,
		id: "part",
		children: [
			n && /* @__PURE__ */ J(Z, { message: n }),
			r && !t && /* @__PURE__ */ J("div", {
				class: "waiting",
				"aria-busy": "true",
				children: [
					"Reading ",
					e,
					" …"
				]
			}),
			t?.sections.map((e) => /* @__PURE__ */ J(Lt, {
				title: e.title,
				rows: e.rows,
				open: !0
			}))
		]
	});
}
function fr(e) {
	return e >= 1e9 ? `${(e / 1e9).toFixed(1)} billion` : e >= 1e6 ? `${(e / 1e6).toFixed(1)} million` : e.toLocaleString("en");
}
// src/papers.tsx
var pr = [
	["trending", "Trending"],
	["day", "Day"],
	["week", "Week"],
	["month", "Month"],
	["all", "All"]
], mr = [
	["", "any state"],
	["runs here", "all that runs"],
	["works", "runs here"],
	["partly", "runs in part"],
	["unmeasured", "runs, not measured"],
	["not yet", "not yet"],
	["not a system", "nothing to run"]
], hr = {
	works: "runs here",
	partly: "runs in part",
	unmeasured: "runs, not measured",
	"not yet": "not yet",
	"not a system": "nothing to run",
	"": "not in the catalogue"
};
function gr(e, t) {
	let [n, r] = I(e);
	return L(() => {
		let n = window.setTimeout(() => r(e), t);
		return () => clearTimeout(n);
	}, [e]), n;
}
function _r({ query: e }) {
	let [t, n] = I(e.get("words") ?? ""), [r, i] = I(60), a = gr(t, 90), o = R(null), s = (t, n) => {
		let r = new URLSearchParams(e);
		n ? r.set(t, n) : r.delete(t), t === "view" && r.delete("day"), Pr(`papers${r.size ? `?${r}` : ""}`);
	};
	L(() => {
		if (a !== (e.get("words") ?? "")) {
			let t = new URLSearchParams(e);
			a ? t.set("words", a) : t.delete("words"), history.replaceState(null, "", `#/papers${t.size ? `?${t}` : ""}`);
		}
	}, [a]);
	let c = new URLSearchParams([...e].filter(([e]) => e !== "words"));
	a.trim() && c.set("words", a), r > 60 && c.set("rows", String(r));
	let { got: l, failed: u } = q(`/api/papers?${c}`);
	l && (o.current = l);
	let d = l ?? o.current, f = e.get("view") ?? d?.view ?? "", p = [
		"day",
		"week",
		"month"
	].includes(f) && !a.trim();
	return /* @__PURE__ */ J(y, { children: [
		/* @__PURE__ */ J($, {
			title: "Papers",
			lead: d ? `${d.of.toLocaleString("en")} papers, each beside what of it runs here.` : ""
		}),
		/* @__PURE__ */ J("div", {
			class: "papers-bar",
			children: [
				/* @__PURE__ */ J("label", {
					class: "search",
					children: [/* @__PURE__ */ J("span", {
						class: "hidden",
						children: "Search papers"
					}), /* @__PURE__ */ J("input", {
						type: "search",
						placeholder: "Search titles, abstracts, authors, methods",
						value: t,
						onInput: (e) => {
							n(e.currentTarget.value), i(60);
						}
					})]
				}),
				/* @__PURE__ */ J(vr, {
					label: "State",
					value: e.get("state") ?? "",
					options: mr,
					change: (e) => s("state", e)
				}),
				/* @__PURE__ */ J(vr, {
					label: "Kind",
					value: e.get("kind") ?? "",
					options: [["", "any kind"], ...(d?.kinds ?? []).map((e) => [e, e])],
					change: (e) => s("kind", e)
				}),
				/* @__PURE__ */ J("label", {
					class: "tick",
					children: [/* @__PURE__ */ J("input", {
						type: "checkbox",
						checked: e.has("marked"),
						onChange: (e) => s("marked", e.currentTarget.checked ? "1" : "")
					}), " marked"]
				})
			]
		}),
		/* @__PURE__ */ J("div", {
			class: "tabs",
			role: "group",
			"aria-label": "Which papers",
			children: [
				pr.map(([e, t]) => /* @__PURE__ */ J("button", {
					type: "button",
					"aria-pressed": f === e && !a.trim(),
					onClick: () => {
						n(""), s("view", e);
					},
					children: t
				})),
				p && d && /* @__PURE__ */ J("span", {
					class: "moving",
					children: [
						/* @__PURE__ */ J("button", {
							type: "button",
							class: "quiet",
							disabled: !d.before,
							onClick: () => s("day", d.before ?? ""),
							children: "← earlier"
						}),
						/* @__PURE__ */ J("b", {
							class: "num",
							children: d.first === d.last ? d.first : `${d.first} to ${d.last}`
						}),
						/* @__PURE__ */ J("button", {
							type: "button",
							class: "quiet",
							disabled: !d.after,
							onClick: () => s("day", d.after ?? ""),
							children: "later →"
						})
					]
				}),
				f === "trending" && !a.trim() && /* @__PURE__ */ J("span", {
					class: "note",
					children: "likes / (1 + days since publication)"
				})
			]
		}),
		u && /* @__PURE__ */ J(Z, { message: u }),
		!d && !u && /* @__PURE__ */ J("div", {
			class: "waiting",
			"aria-busy": "true",
			children: "Opening the store of papers …"
		}),
		d && !d.papers.length && /* @__PURE__ */ J(yr, {
			shown: d,
			words: a.trim(),
			dated: f !== "all"
		}),
		/* @__PURE__ */ J("ul", {
			class: "papers",
			"aria-label": "Papers",
			children: d?.papers.map((e) => /* @__PURE__ */ J("li", { children: /* @__PURE__ */ J(Sr, { paper: e }) }, e.name))
		}),
		d && d.more > 0 && /* @__PURE__ */ J("button", {
			type: "button",
			class: "more",
			onClick: () => i(r + 120),
			children: "More papers"
		})
	] });
}
function vr({ label: e, value: t, options: n, change: r }) {
	return /* @__PURE__ */ J("label", {
		class: "pick",
		children: [/* @__PURE__ */ J("span", {
			class: "hidden",
			children: e
		}), /* @__PURE__ */ J("select", {
			"aria-label": e,
			value: t,
			onChange: (e) => r(e.currentTarget.value),
			children: n.map(([e, t]) => /* @__PURE__ */ J("option", {
				value: e,
				children: t
			}))
		})]
	});
}
function yr({ shown: e, words: t, dated: n }) {
	return n && !t && !e.dated ? /* @__PURE__ */ J(X, {
		title: "No feed has been read yet",
		children: /* @__PURE__ */ J("p", { children: [
			"What is published comes from a feed: ",
			/* @__PURE__ */ J("code", { children: "patchbay papers sync hugging-face" }),
			", ",
			/* @__PURE__ */ J("code", { children: "arxiv" }),
			", or a saved Daily Papers page. The catalogue's ",
			e.of,
			" papers are under ",
			/* @__PURE__ */ J("a", {
				href: "#/papers?view=all",
				children: "All"
			}),
			"."
		] })
	}) : /* @__PURE__ */ J(X, {
		title: t ? `No paper has all of “${t}”` : "No papers here",
		children: /* @__PURE__ */ J("p", { children: [
			"Fewer words or filters find more of ",
			e.of.toLocaleString("en"),
			"."
		] })
	});
}
function br({ text: e }) {
	return /* @__PURE__ */ J(y, { children: e.split(/\x02([^\x03]*)\x03/).map((e, t) => t % 2 ? /* @__PURE__ */ J("mark", { children: e }) : e) });
}
function xr(e) {
	let t = e.authors.slice(0, 3).join(", "), n = Math.max(e.n_authors ?? 0, e.authors.length);
	return t ? n > 3 ? `${t} and ${n - 3} more` : t : e.organization || (n ? `${n} author${n === 1 ? "" : "s"}` : "");
}
function Sr({ paper: e }) {
	return /* @__PURE__ */ J("article", {
		class: "paper",
		children: [/* @__PURE__ */ J("div", {
			class: "paper-side num",
			children: e.likes !== null && /* @__PURE__ */ J("span", {
				class: "likes",
				title: "likes",
				children: [/* @__PURE__ */ J("b", { children: e.likes.toLocaleString("en") }), /* @__PURE__ */ J("small", { children: "likes" })]
			})
		}), /* @__PURE__ */ J("div", {
			class: "paper-body",
			children: [
				/* @__PURE__ */ J("h2", { children: /* @__PURE__ */ J("a", {
					href: `#/paper/${encodeURIComponent(e.name)}`,
					children: /* @__PURE__ */ J(br, { text: e.marked_title ?? e.title })
				}) }),
				/* @__PURE__ */ J("p", {
					class: "paper-line",
					children: [
						/* @__PURE__ */ J("span", {
							class: `state ${e.state === "works" ? "done" : e.state === "partly" ? "running" : ""}`,
							children: hr[e.state] ?? e.state
						}),
						e.verdict && /* @__PURE__ */ J("span", {
							class: `state ${Cr(e.verdict)}`,
							children: e.verdict
						}),
						e.marked && /* @__PURE__ */ J("span", {
							class: "state",
							children: "marked"
						}),
						/* @__PURE__ */ J("span", { children: [
							xr(e),
							e.published ?? e.year,
							e.kind
						].filter(Boolean).join(" · ") })
					]
				}),
				e.snippet && /* @__PURE__ */ J("p", {
					class: "snippet",
					children: /* @__PURE__ */ J(br, { text: e.snippet })
				}),
				/* @__PURE__ */ J(wr, { methods: e.methods })
			]
		})]
	});
}
function Cr(e) {
	return e.startsWith("confirmed") ? "done" : e.startsWith("not confirmed") ? "failed" : "";
}
function wr({ methods: e }) {
	return e.length ? /* @__PURE__ */ J("ul", {
		class: "chips",
		children: e.map((e) => /* @__PURE__ */ J("li", { children: /^(find|prove|turn|decode|train|measure)\./.test(e) ? /* @__PURE__ */ J("a", {
			href: `#/${e.replace(".", "/")}`,
			children: e
		}) : /* @__PURE__ */ J("span", { children: e }) }))
	}) : null;
}
function Tr({ name: e, state: t }) {
	let [n, r] = I(0), i = (t?.runs ?? []).filter((e) => e.room === "papers" && e.state === "done").length, { got: a, failed: o } = q(`/api/paper?name=${encodeURIComponent(e)}`, `${n} ${i}`), [s, c] = I("");
	if (o) return /* @__PURE__ */ J(Z, {
		message: o,
		children: /* @__PURE__ */ J("p", { children: /* @__PURE__ */ J("a", {
			href: "#/papers",
			children: "All papers"
		}) })
	});
	if (!a) return /* @__PURE__ */ J("div", {
		class: "waiting",
		"aria-busy": "true",
		children: "Reading the paper …"
	});
	let l = [...t?.runs ?? []].reverse().find((e) => e.room === "papers" && e.method === a.key), u = l && [
		"queued",
		"running",
		"stopping"
	].includes(l.state), d = () => Ge("/api/papers/check", { key: a.key }).then(() => c(""), (e) => c(e.message)), f = () => Ge("/api/papers/mark", {
		name: e,
		marked: +!a.marked
	}).then(() => r(n + 1), (e) => c(e.message)), p = a.likes_by_day.filter((e) => e.likes !== null);
	return /* @__PURE__ */ J(y, { children: [
		/* @__PURE__ */ J($, {
			title: a.title,
			back: {
				to: "#/papers",
				text: "Papers"
			},
			lead: [a.authors.length ? a.authors.slice(0, 12).join(", ") + (a.authors.length > 12 ? ` and ${a.authors.length - 12} more` : "") : xr(a), a.published ?? a.year].filter(Boolean).join(" · "),
			children: /* @__PURE__ */ J("div", {
				class: "exports",
				children: [
					a.address && /* @__PURE__ */ J("a", {
						href: a.address,
						target: "_blank",
						rel: "noreferrer",
						children: ["arXiv ", a.arxiv]
					}),
					/^https:\/\//.test(a.code) && /* @__PURE__ */ J("a", {
						href: a.code,
						target: "_blank",
						rel: "noreferrer",
						children: "Code"
					}),
					a.likes !== null && /* @__PURE__ */ J("span", {
						class: "num",
						children: [a.likes, " likes"]
					}),
					/* @__PURE__ */ J("button", {
						type: "button",
						class: "quiet",
						"aria-pressed": a.marked,
						onClick: f,
						children: a.marked ? "Take the mark away" : "Mark"
					})
				]
			})
		}),
		s && /* @__PURE__ */ J(Z, { message: s }),
		/* @__PURE__ */ J(Y, {
			title: "What of it runs here",
			aside: /* @__PURE__ */ J("span", {
				class: `state ${a.state === "works" ? "done" : a.state === "partly" ? "running" : ""}`,
				children: hr[a.state] ?? a.state
			}),
			children: [
				a.does && /* @__PURE__ */ J("p", { children: [a.does, "."] }),
				a.headline && /* @__PURE__ */ J("p", {
					class: "note",
					children: a.headline
				}),
				/* @__PURE__ */ J(wr, { methods: a.methods }),
				!a.key && /* @__PURE__ */ J("p", {
					class: "note",
					children: [
						"The catalogue has no entry for it. In a checkout, ",
						/* @__PURE__ */ J("code", { children: [
							"patchbay papers add ",
							a.arxiv ?? "TITLE",
							" --name METHOD"
						] }),
						" begins one."
					]
				}),
				a.claim && /* @__PURE__ */ J("dl", {
					class: "claim",
					children: [
						/* @__PURE__ */ J("dt", { children: "Claim" }),
						/* @__PURE__ */ J("dd", { children: a.claim }),
						a.measured && /* @__PURE__ */ J(y, { children: [/* @__PURE__ */ J("dt", { children: ["Measured", a.model ? ` on ${a.model}` : ""] }), /* @__PURE__ */ J("dd", { children: a.measured })] })
					]
				}),
				a.verdicts.map((e) => /* @__PURE__ */ J("details", {
					class: "verdict",
					children: [
						/* @__PURE__ */ J("summary", { children: [
							/* @__PURE__ */ J("span", {
								class: `state ${Cr(e.verdict)}`,
								children: e.verdict
							}),
							" on ",
							e.model,
							", ",
							/* @__PURE__ */ J("span", {
								class: "num",
								children: e.at.slice(0, 10)
							})
						] }),
						/* @__PURE__ */ J("p", {
							class: "said",
							children: e.told
						}),
						/* @__PURE__ */ J("p", {
							class: "note",
							children: ["Weights ", /* @__PURE__ */ J("code", { children: e.weights })]
						})
					]
				})),
				a.claim && /* @__PURE__ */ J("div", {
					class: "form-foot",
					children: [
						/* @__PURE__ */ J("button", {
							type: "button",
							class: "primary",
							disabled: t?.model.state !== "ready" || u,
							onClick: d,
							children: ["Check the claim", t?.model.source ? ` on ${t.model.source}` : ""]
						}),
						t?.model.state === "none" && /* @__PURE__ */ J("span", {
							class: "note",
							children: [
								"Start ",
								/* @__PURE__ */ J("code", { children: "patchbay ui MODEL" }),
								" to check it."
							]
						}),
						a.command && /* @__PURE__ */ J("span", {
							class: "note",
							children: [
								/* @__PURE__ */ J("code", { children: a.command }),
								" ",
								/* @__PURE__ */ J(tt, { text: () => a.command })
							]
						})
					]
				}),
				l && /* @__PURE__ */ J(Qn, { run: l })
			]
		}),
		a.abstract && /* @__PURE__ */ J(Y, {
			title: "Abstract",
			children: /* @__PURE__ */ J("p", {
				class: "abstract",
				children: a.abstract
			})
		}),
		p.length > 1 && /* @__PURE__ */ J(Y, {
			title: "Likes",
			children: /* @__PURE__ */ J(pt, {
				x: p.map((e) => Date.parse(e.day) / 864e5 - Date.parse(p[0].day) / 864e5),
				lines: [{
					name: "likes",
					y: p.map((e) => e.likes)
				}],
				axis: `days since ${p[0].day}`,
				unit: "likes",
				label: "Likes by day"
			})
		}),
		a.similar.length > 0 && /* @__PURE__ */ J(Y, {
			title: "Papers like it",
			aside: /* @__PURE__ */ J("span", {
				class: "note",
				children: "by the words that mark them (tf-idf)"
			}),
			children: /* @__PURE__ */ J("ul", {
				class: "near",
				children: a.similar.map((e) => /* @__PURE__ */ J("li", { children: [
					/* @__PURE__ */ J("a", {
						href: `#/paper/${encodeURIComponent(e.name)}`,
						children: e.title
					}),
					" ",
					/* @__PURE__ */ J("span", {
						class: "note",
						children: [
							e.year,
							hr[e.state] ?? e.state,
							e.heat ? H(e.heat) : ""
						].filter(Boolean).join(" · ")
					})
				] }))
			})
		})
	] });
}
// src/prompt.tsx
var Er = "The capital of Lolavia is Grerum. Emma asked Kate about the violin. The capital of Lolavia is";
function Dr({ query: e, state: t }) {
	let n = e.get("text") ?? "", [r, i] = I(n), a = t?.model.state, { got: o, failed: s, busy: c } = K(a === "ready" && n ? {
		what: "prompt",
		text: n
	} : null);
	L(() => i(n), [n]);
	let l = (e) => {
		e.preventDefault(), r && Pr(`prompt?${new URLSearchParams({ text: r })}`);
	};
	return /* @__PURE__ */ J(y, { children: [
		/* @__PURE__ */ J($, { title: "Prompt" }),
		/* @__PURE__ */ J("form", {
			class: "panel ask",
			onSubmit: l,
			children: [
				/* @__PURE__ */ J("label", {
					for: "text",
					class: "hidden",
					children: "Prompt"
				}),
				/* @__PURE__ */ J("textarea", {
					id: "text",
					rows: 3,
					value: r,
					placeholder: "A text for the model to read",
					onInput: (e) => i(e.currentTarget.value),
					onKeyDown: (e) => {
						e.key === "Enter" && (e.ctrlKey || e.metaKey) && l(e);
					}
				}),
				/* @__PURE__ */ J("div", {
					class: "form-foot",
					children: [
						/* @__PURE__ */ J("button", {
							type: "submit",
							class: "primary",
							disabled: !r || a === "none" || a === "failed",
							children: "Read it"
						}),
						!r && /* @__PURE__ */ J("button", {
							type: "button",
							class: "quiet",
							onClick: () => i(Er),
							children: "An example"
						}),
						/* @__PURE__ */ J("span", {
							class: "note",
							children: "Ctrl + Enter"
						})
					]
				})
			]
		}),
		a === "none" && /* @__PURE__ */ J(X, {
			title: "No model is open",
			children: /* @__PURE__ */ J("p", { children: [
				"Start ",
				/* @__PURE__ */ J("code", { children: "patchbay ui MODEL" }),
				", such as ",
				/* @__PURE__ */ J("code", { children: "patchbay ui tiny" }),
				"."
			] })
		}),
		a === "failed" && /* @__PURE__ */ J(Z, { message: t?.model.message ?? "" }),
		s && /* @__PURE__ */ J(Z, { message: s }),
		n && !o && !s && (c || a === "loading") && /* @__PURE__ */ J("div", {
			class: "waiting",
			"aria-busy": "true",
			children: a === "loading" ? "The model is loading …" : t?.runs.some((e) => e.state === "running") ? "Waiting for the run to end …" : "The model is reading …"
		}),
		o && n && /* @__PURE__ */ J(Or, {
			got: o,
			text: n
		})
	] });
}
function Or({ got: e, text: t }) {
	let n = e.tokens, r = V(e.next, "surprise"), [i, a] = I(null), o = i ?? n.length - 1, s = (e.next.tables.next?.rows ?? []).filter((e) => e.position === o);
	return /* @__PURE__ */ J(y, { children: [
		/* @__PURE__ */ J(Y, {
			title: `${n.length} tokens`,
			aside: /* @__PURE__ */ J("span", {
				class: "note",
				children: ["by surprise at each, ", r?.unit]
			}),
			children: /* @__PURE__ */ J("div", {
				class: n.length > 160 ? "tokens-scroll" : "",
				tabIndex: n.length > 160 ? 0 : void 0,
				children: /* @__PURE__ */ J(Ut, {
					tokens: n,
					values: r ? B(r) ?? void 0 : void 0,
					unit: r?.unit ?? "",
					label: "Tokens of the prompt; choose one to see what comes after it",
					chosen: o,
					onPick: a,
					legend: !0
				})
			})
		}),
		/* @__PURE__ */ J(Y, {
			title: `What comes after ${o} ${G(n[o] ?? "")}`,
			children: [s.length ? /* @__PURE__ */ J("ol", {
				class: "next",
				children: s.map((e) => /* @__PURE__ */ J("li", { children: [
					/* @__PURE__ */ J("code", { children: G(String(e.token)) }),
					/* @__PURE__ */ J("span", {
						class: "next-bar",
						children: /* @__PURE__ */ J("i", { style: { width: `${100 * Number(e.probability)}%` } })
					}),
					/* @__PURE__ */ J("span", {
						class: "num",
						children: H(e.probability)
					})
				] }))
			}) : /* @__PURE__ */ J("p", {
				class: "note",
				children: "Listed are the last 64 positions."
			}), /* @__PURE__ */ J("p", {
				class: "note",
				children: [
					"Why? ",
					/* @__PURE__ */ J("code", { children: "patchbay why" }),
					" of this prompt: ",
					/* @__PURE__ */ J("a", {
						href: `#/find/logit_lens?${new URLSearchParams({ given: JSON.stringify({ prompt: t }) })}`,
						children: "logit lens"
					})
				]
			})]
		}),
		e.lens ? /* @__PURE__ */ J(Y, {
			title: "Logit lens",
			class: "plain",
			children: /* @__PURE__ */ J(tn, { doc: e.lens })
		}) : /* @__PURE__ */ J(Y, {
			title: "Logit lens",
			children: /* @__PURE__ */ J("p", {
				class: "note",
				children: e.lens_message
			})
		}),
		/* @__PURE__ */ J(kr, {
			text: t,
			n: n.length
		}),
		e.heads.some(Boolean) && /* @__PURE__ */ J(jr, {
			text: t,
			heads: e.heads
		})
	] });
}
function kr({ text: e, n: t }) {
	let [n, r] = I(""), [i, a] = I("");
	return L(() => a(""), [e]), /* @__PURE__ */ J(Y, {
		title: "Patch from another prompt",
		children: [/* @__PURE__ */ J("form", {
			class: "patch-form",
			onSubmit: (e) => {
				e.preventDefault(), a(n);
			},
			children: [
				/* @__PURE__ */ J("label", {
					class: "hidden",
					for: "other",
					children: "Another prompt"
				}),
				/* @__PURE__ */ J("textarea", {
					id: "other",
					rows: 2,
					value: n,
					placeholder: `A prompt of ${t} tokens with another answer: where does what differs sit?`,
					onInput: (e) => r(e.currentTarget.value)
				}),
				/* @__PURE__ */ J("div", {
					class: "form-foot",
					children: [/* @__PURE__ */ J("button", {
						type: "submit",
						class: "primary",
						disabled: !n.trim() || n === e,
						children: "Patch every cell"
					}), !n && /* @__PURE__ */ J("button", {
						type: "button",
						class: "quiet",
						onClick: () => r(e),
						children: "Begin with this prompt"
					})]
				})
			]
		}), i && /* @__PURE__ */ J(Ar, {
			text: e,
			other: i,
			n: t
		}, `${e}\n${i}`)]
	});
}
function Ar({ text: e, other: t, n }) {
	let [r, i] = I([]), { got: a, failed: o } = K({
		what: "patching",
		text: e,
		other: t
	}, (e) => i((t) => [...t, e])), [s, c] = I(null), l = K(s ? {
		what: "cell",
		text: e,
		other: t,
		layer: s[0],
		position: s[1]
	} : null), u = z(() => Float64Array.from(r.flatMap((e) => e.values)), [r]);
	if (o) return /* @__PURE__ */ J(Z, { message: o });
	if (!r.length) return /* @__PURE__ */ J("div", {
		class: "waiting",
		"aria-busy": "true",
		children: "Patching the first layer …"
	});
	let d = (a?.tokens ?? Array.from({ length: n }, (e, t) => String(t))).map((e, t) => a && a.others[t] !== e ? `${G(e)} ← ${G(a.others[t] ?? "")}` : G(e));
	return /* @__PURE__ */ J(y, { children: [
		/* @__PURE__ */ J("p", {
			class: "note",
			role: "status",
			children: a ? /* @__PURE__ */ J(y, { children: [
				"Logit of ",
				/* @__PURE__ */ J("code", { children: G(a.theirs) }),
				" over ",
				/* @__PURE__ */ J("code", { children: G(a.ours) }),
				" with the other prompt's stream in one place; ",
				H(a.clean),
				" without, ",
				H(a.other),
				" in the other prompt. Choose a cell."
			] }) : `${r.length} layers done …`
		}),
		/* @__PURE__ */ J(bt, {
			values: u,
			rows: r.map((e) => `L${e.layer}`),
			columns: d,
			axes: ["layer", "position"],
			unit: "logits",
			label: "Logit of the other answer over this one's",
			upward: !0,
			...a ? { range: [Math.min(a.clean, a.other, ...u), Math.max(a.clean, a.other, ...u)] } : {},
			onPick: (e, t) => c([r[e]?.layer ?? e, t]),
			picked: s ? s[0] * n + s[1] : null
		}),
		l.failed && /* @__PURE__ */ J(Z, { message: l.failed }),
		s && !l.failed && (l.got ? /* @__PURE__ */ J("div", {
			class: "cell-told",
			children: [/* @__PURE__ */ J("h3", { children: /* @__PURE__ */ J("code", { children: l.got.edit }) }), /* @__PURE__ */ J(Jn, {
				rows: l.got.next,
				before: "as it was",
				after: "patched"
			})]
		}) : /* @__PURE__ */ J("div", {
			class: "waiting",
			"aria-busy": "true",
			children: [
				"Patching L",
				s[0],
				" at ",
				s[1],
				" …"
			]
		}))
	] });
}
function jr({ text: e, heads: t }) {
	let [n, r] = I(t.findIndex(Boolean)), [i, a] = I(0), o = K({
		what: "heads",
		text: e,
		layer: n
	}), s = K({
		what: "pattern",
		text: e,
		layer: n,
		head: i
	});
	return /* @__PURE__ */ J(Y, {
		title: "Where heads look",
		aside: /* @__PURE__ */ J("label", {
			class: "pick",
			children: [/* @__PURE__ */ J("span", { children: "layer" }), /* @__PURE__ */ J("select", {
				value: String(n),
				onChange: (e) => {
					r(Number(e.currentTarget.value)), a(0);
				},
				children: t.map((e, t) => e ? /* @__PURE__ */ J("option", {
					value: String(t),
					children: ["L", t]
				}) : null)
			})]
		}),
		children: [
			o.failed && /* @__PURE__ */ J(Z, { message: o.failed }),
			/* @__PURE__ */ J("div", {
				class: "thumbs",
				role: "group",
				"aria-label": `Heads of layer ${n}`,
				children: (o.got?.heads ?? []).map((e) => /* @__PURE__ */ J("button", {
					type: "button",
					"aria-pressed": e.head === i,
					onClick: () => a(e.head),
					children: [
						/* @__PURE__ */ J(Mr, {
							side: o.got?.side ?? 1,
							data: e.data
						}),
						"L",
						n,
						".H",
						e.head
					]
				}))
			}),
			s.failed && /* @__PURE__ */ J(Z, { message: s.failed }),
			s.got ? /* @__PURE__ */ J("div", {
				class: "nested",
				children: /* @__PURE__ */ J(tn, { doc: s.got })
			}) : !s.failed && /* @__PURE__ */ J("div", {
				class: "waiting",
				"aria-busy": "true",
				children: [
					"Reading L",
					n,
					".H",
					i,
					" …"
				]
			})
		]
	});
}
function Mr({ side: e, data: t }) {
	let n = R(null);
	return L(() => {
		let r = n.current?.getContext("2d");
		if (!r) return;
		let i = r.createImageData(e, e);
		t.forEach((e, t) => i.data.set([
			34,
			120,
			186,
			Math.round(255 * Math.sqrt(Math.max(0, Math.min(1, e))))
		], 4 * t)), r.clearRect(0, 0, e, e), r.putImageData(i, 0, 0);
	}, [t, e]), /* @__PURE__ */ J("canvas", {
		ref: n,
		width: e,
		height: e,
		"aria-hidden": "true"
	});
}
// src/app.tsx
function Nr() {
	let [e, t] = location.hash.replace(/^#\/?/, "").split("?");
	return {
		path: (e ?? "").split("/").filter(Boolean).map(decodeURIComponent),
		query: new URLSearchParams(t ?? "")
	};
}
function Pr(e) {
	location.hash = `#/${e}`;
}
var Fr = {
	find: "Find",
	prove: "Prove",
	turn: "Turn",
	decode: "Decode",
	train: "Train",
	measure: "Measure"
};
function Ir() {
	let [e, t] = I(Nr), { state: n, lost: r } = Ye(), i = q("/api/about");
	L(() => {
		let e = () => {
			t(Nr()), document.getElementById("main")?.scrollIntoView({ block: "start" });
		};
		return addEventListener("hashchange", e), () => removeEventListener("hashchange", e);
	}, []);
	let a = e.path[0] ?? "papers";
	L(() => {
		document.title = [...e.path.slice(0, 2).reverse().map(decodeURIComponent), "Patchbay"].join(" · ");
	}, [e]);
	let o = i.got?.rooms.map((e) => e.name) ?? Object.keys(Fr), s = n?.runs.filter((e) => [
		"queued",
		"running",
		"stopping"
	].includes(e.state)) ?? [], c = (e, t, n) => /* @__PURE__ */ J("a", {
		href: `#/${e}`,
		"aria-current": a === e || a === "paper" && e === "papers" || a === "compare" && e === "results" ? "page" : void 0,
		children: [t, n && /* @__PURE__ */ J("span", {
			class: "badge num",
			children: n
		})]
	});
	return /* @__PURE__ */ J("div", {
		class: "shell",
		children: [
			/* @__PURE__ */ J("a", {
				class: "skip",
				href: "#main",
				onClick: (e) => {
					e.preventDefault(), document.getElementById("main")?.focus();
				},
				children: "To the content"
			}),
			/* @__PURE__ */ J("header", {
				class: "side",
				children: [
					/* @__PURE__ */ J("a", {
						class: "brand",
						href: "#/",
						children: [/* @__PURE__ */ J(Br, {}), " Patchbay"]
					}),
					/* @__PURE__ */ J("nav", {
						"aria-label": "Pages",
						children: [
							c("papers", "Papers"),
							c("prompt", "Prompt"),
							c("model", "Model"),
							c("features", "Features"),
							/* @__PURE__ */ J("span", { class: "nav-rule" }),
							o.map((e) => c(e, Fr[e] ?? e)),
							c("knobs", "Knobs"),
							/* @__PURE__ */ J("span", { class: "nav-rule" }),
							c("results", "Results"),
							c("runs", "Runs", s.length ? String(s.length) : void 0)
						]
					}),
					/* @__PURE__ */ J(Rr, { state: n }),
					/* @__PURE__ */ J(zr, {})
				]
			}),
			/* @__PURE__ */ J("div", {
				class: "content",
				children: [
					r && /* @__PURE__ */ J("div", {
						class: "lost",
						role: "alert",
						children: [
							"The server has stopped or cannot be reached; what is shown stays. Start it again with ",
							/* @__PURE__ */ J("code", { children: "patchbay ui" }),
							" and open its new address."
						]
					}),
					s[0] && a !== "runs" && /* @__PURE__ */ J($n, {
						run: s[0],
						waiting: s.length - 1
					}),
					/* @__PURE__ */ J("main", {
						id: "main",
						tabIndex: -1,
						children: i.failed ? /* @__PURE__ */ J(Z, { message: i.failed }) : /* @__PURE__ */ J(Lr, {
							place: e,
							state: n,
							about: i.got
						})
					})
				]
			})
		]
	});
}
function Lr({ place: e, state: t, about: n }) {
	let [r = "papers", ...i] = e.path, a = n?.rooms.find((e) => e.name === r);
	return r === "results" ? i.length ? /* @__PURE__ */ J(jn, {
		name: i.join("/"),
		changed: t?.results ?? 0
	}) : /* @__PURE__ */ J(An, {
		changed: t?.results ?? 0,
		folder: n?.folder ?? ""
	}) : r === "papers" ? /* @__PURE__ */ J(_r, { query: e.query }) : r === "paper" ? /* @__PURE__ */ J(Tr, {
		name: i.join("/"),
		state: t
	}) : r === "compare" ? /* @__PURE__ */ J(Mn, {
		query: e.query,
		changed: t?.results ?? 0
	}) : r === "knobs" ? /* @__PURE__ */ J(Wn, {
		query: e.query,
		state: t
	}) : r === "features" ? /* @__PURE__ */ J(In, {
		part: i.join("/"),
		query: e.query,
		state: t
	}) : r === "model" ? /* @__PURE__ */ J(cr, {
		part: i.join("/"),
		state: t
	}) : r === "prompt" ? /* @__PURE__ */ J(Dr, {
		query: e.query,
		state: t
	}) : r === "runs" ? /* @__PURE__ */ J(Zn, { runs: t?.runs ?? null }) : a && n ? i[0] ? /* @__PURE__ */ J(ar, {
		room: a.name,
		name: i[0],
		state: t,
		about: n,
		query: e.query
	}) : /* @__PURE__ */ J(ir, { room: a }) : n ? /* @__PURE__ */ J(y, { children: [/* @__PURE__ */ J($, { title: "No such page" }), /* @__PURE__ */ J(Z, {
		message: `There is no page ${e.path.join("/")}.`,
		children: /* @__PURE__ */ J("p", { children: /* @__PURE__ */ J("a", {
			href: "#/results",
			children: "To the results"
		}) })
	})] }) : /* @__PURE__ */ J("div", {
		class: "waiting",
		"aria-busy": "true",
		children: "Opening …"
	});
}
function Rr({ state: e }) {
	let t = e?.model;
	if (!t) return /* @__PURE__ */ J("p", {
		class: "model-line",
		children: [/* @__PURE__ */ J("span", { class: "lamp" }), " …"]
	});
	let n = {
		none: "no model",
		loading: "loading",
		ready: "ready",
		failed: "did not load"
	}[t.state];
	return /* @__PURE__ */ J("p", {
		class: "model-line",
		title: t.message,
		children: [
			/* @__PURE__ */ J("span", {
				class: `lamp ${t.state}`,
				"aria-hidden": "true"
			}),
			/* @__PURE__ */ J("b", { children: t.source ?? "No model" }),
			/* @__PURE__ */ J("span", { children: t.source ? n : "results only" })
		]
	});
}
function zr() {
	let [e, t] = I(localStorage.getItem("patchbay-theme") ?? "system");
	return L(() => {
		e === "system" ? delete document.documentElement.dataset.theme : document.documentElement.dataset.theme = e, localStorage.setItem("patchbay-theme", e);
	}, [e]), /* @__PURE__ */ J("label", {
		class: "theme",
		children: [/* @__PURE__ */ J("span", { children: "Colours" }), /* @__PURE__ */ J("select", {
			value: e,
			onChange: (e) => t(e.currentTarget.value),
			children: [
				/* @__PURE__ */ J("option", {
					value: "system",
					children: "system"
				}),
				/* @__PURE__ */ J("option", {
					value: "light",
					children: "light"
				}),
				/* @__PURE__ */ J("option", {
					value: "dark",
					children: "dark"
				})
			]
		})]
	});
}
function Br() {
	return /* @__PURE__ */ J("svg", {
		class: "mark",
		viewBox: "0 0 32 32",
		"aria-hidden": "true",
		children: [
			/* @__PURE__ */ J("path", { d: "M9 10 C 9 26, 23 6, 23 22" }),
			/* @__PURE__ */ J("circle", {
				cx: "9",
				cy: "10",
				r: "5"
			}),
			/* @__PURE__ */ J("circle", {
				cx: "23",
				cy: "22",
				r: "5"
			}),
			/* @__PURE__ */ J("circle", {
				class: "hole",
				cx: "9",
				cy: "10",
				r: "1.8"
			}),
			/* @__PURE__ */ J("circle", {
				class: "hole",
				cx: "23",
				cy: "22",
				r: "1.8"
			})
		]
	});
}
// src/saved.tsx
function Vr({ doc: e, bare: t }) {
	return /* @__PURE__ */ J("div", {
		class: t ? "alone bare" : "alone",
		children: [
			/* @__PURE__ */ J("header", {
				class: "alone-head",
				children: [t ? /* @__PURE__ */ J("p", {
					class: "alone-title",
					children: kn(e)
				}) : /* @__PURE__ */ J("h1", { children: kn(e) }), /* @__PURE__ */ J("p", {
					class: "lead-line",
					children: e.kind === "result" ? (e.asked ? `${e.asked} · ` : "") + e.title.replace(/^[^:]*: /, "") : W(e.method)
				})]
			}),
			t ? /* @__PURE__ */ J(tn, { doc: e }) : /* @__PURE__ */ J("main", { children: /* @__PURE__ */ J(tn, { doc: e }) }),
			!t && /* @__PURE__ */ J("footer", {
				class: "foot",
				children: ["Made by patchbay. ", e.origin]
			})
		]
	});
}
// src/main.tsx
function Hr({ model: e, el: t }) {
	let n = () => M(/* @__PURE__ */ J(Vr, {
		doc: JSON.parse(String(e.get("document"))),
		bare: !0
	}), t);
	t.classList.add("pb", "pb-cell"), t.dataset.dark = String(et());
	let r = new MutationObserver(() => t.dataset.dark = String(et()));
	return r.observe(document.body, {
		attributes: !0,
		attributeFilter: ["data-jp-theme-light", "class"]
	}), n(), e.on("change:document", n), () => {
		r.disconnect(), e.off("change:document", n), M(null, t);
	};
}
var Ur = document.getElementById("patchbay-page");
if (Ur) {
	let e = document.getElementById("patchbay-data");
	M(e ? /* @__PURE__ */ J(Vr, { doc: JSON.parse(e.textContent ?? "null") }) : /* @__PURE__ */ J(Ir, {}), Ur);
}
var Wr = { render: Hr };
export { Wr as default };
