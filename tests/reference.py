"""The algorithm once more, as the paper and the authors' script write it: plain, 2k gradients, no shared code."""

import copy

import torch


class Reference:
    """Lookbehind by the book: every quantity has its own copy, every gradient is computed where it is used.

    Only for deterministic closures. The base optimizer is torch's own; everything around it is spelled out.
    """

    def __init__(self, model, optimizer, *, k, rho, alpha, ascent="sam", eta=0.01, descent="every", clip=None):
        self.model, self.optimizer, self.clip = model, optimizer, clip
        self.k, self.rho, self.alpha, self.ascent, self.eta, self.descent = k, rho, alpha, ascent, eta, descent
        in_optimizer = {p for group in optimizer.param_groups for p in group["params"]}
        names = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            if p.requires_grad and p in in_optimizer:
                names[p] = names.get(p, "") + " " + name
        self.names = names

    def read(self):
        return {p: p.detach().clone() for p in self.names}

    def write(self, weights):
        for p, value in weights.items():
            p.data.copy_(value)

    def gradient_at(self, weights, closure):
        self.write(weights)
        loss = closure()
        return loss.item(), {p: p.grad.detach().clone() for p in self.names if p.grad is not None}

    def perturbation(self, gradient, weights):
        scale = {}
        for p in gradient:
            is_scaled = self.ascent == "asam" and "weight" in self.names[p]
            scale[p] = weights[p].abs() + self.eta if is_scaled else torch.ones_like(weights[p])
        norm = sum(((scale[p] * g) ** 2).sum() for p, g in gradient.items()) ** 0.5
        eps = {p: self.rho * scale[p] ** 2 * g / (norm + 1e-16) for p, g in gradient.items()}
        return eps, norm.item()

    def base_step(self, weights, gradient):
        self.write(weights)
        for p in self.names:
            p.grad = gradient[p].clone() if p in gradient else None
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_([p for p in self.names if p.grad is not None], self.clip)
        self.optimizer.step()
        return self.read()

    def step(self, closure, ascent_closure=None):
        slow = self.read()
        perturbed, fast = copy.copy(slow), copy.copy(slow)
        first, losses, self.grad_norms = None, [], []
        for i in range(1, self.k + 1):
            loss, gradient = self.gradient_at(perturbed, (i == 1 and ascent_closure) or closure)
            losses.append(loss)
            eps, norm = self.perturbation(gradient, perturbed)
            self.grad_norms.append(norm)
            perturbed = {p: perturbed[p] + eps[p] if p in eps else perturbed[p] for p in perturbed}
            loss, gradient = self.gradient_at(perturbed, closure)
            if i == self.k:
                losses.append(loss)
            if self.descent == "every" or i == self.k:
                fast = self.base_step(fast, gradient)
            first = first or fast
        if self.k == 0:
            loss, gradient = self.gradient_at(slow, closure)
            losses.append(loss)
            fast = self.base_step(fast, gradient)
        self.losses = losses
        self.reach = sum(((perturbed[p] - slow[p]) ** 2).sum() for p in slow) ** 0.5
        self.write({p: slow[p] + self.alpha_of(p, slow, first, fast) * (fast[p] - slow[p]) for p in slow})

    def alpha_of(self, p, slow, first, fast):
        if self.alpha == "adaptive":
            tensors = [p]
        elif self.alpha == "adaptive-global":
            tensors = list(slow)
        else:
            return self.alpha
        a = torch.cat([(first[q] - slow[q]).flatten() for q in tensors])
        b = torch.cat([(fast[q] - slow[q]).flatten() for q in tensors])
        cosine = a.dot(b) / (a.norm().clamp(min=1e-8) * b.norm().clamp(min=1e-8))
        return (cosine + 1) / 2
